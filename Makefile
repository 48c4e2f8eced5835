# One environment in .venv/, made on first use and reused after; every target makes it if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

.PHONY: help env check test fuzz faults demo clean

help:
	@echo "make demo    the whole way on simulated images (no download but the packages)"
	@echo "make test    the whole test suite"
	@echo "make fuzz    mutated bytes of every kind of file, a minute for each (15 minutes)"
	@echo "make faults  kills, full disks, read-only folders, every single changed bit (30 minutes)"
	@echo "make check   formatting, lint and types"
	@echo "make env     only the environment in $(VENV)/"
	@echo "make clean   remove $(VENV)/ and what the demo wrote"

env: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"error: expected Python 3.11 or newer, got {v.major}.{v.minor}; run make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "this Python has no ensurepip: installing the system package python3-venv"; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq python3-venv; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)/ (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(READY)
	$(BIN)/python -m pytest

fuzz: $(READY)
	$(BIN)/python tests/fuzz.py

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/flips.py

demo: $(READY)
	$(BIN)/dragn-cache demo --out demo

clean:
	rm -rf $(VENV) demo
