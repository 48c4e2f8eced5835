"""A data set, its store and a run, made by the commands once for all their tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import EXTRACT, SIZES, ok
from conftest import write_dataset


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("cli") / "tiny", SIZES, seed=3)


@pytest.fixture(scope="session")
def store(data: Path) -> Path:
    path = data.parent / "tiny.features"
    ok("extract", "--dataset", data, "--out", path, *EXTRACT)
    return path


@pytest.fixture(scope="session")
def trained(store: Path) -> Path:
    path = store.parent / "run"
    ok("train-agg", "--store", store, "--out", path, "--epochs", 2, "--unit", "L1Agg")
    return path
