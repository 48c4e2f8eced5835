"""The program itself: its help, its version, and what every command refuses alike."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from command_line import ok, refused, run
from dragn_cache_cli.app import COMMANDS, guarded

from dragn_cache.errors import is_out_of_memory


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_commands_help_has_an_example(command: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", ok(command, "--help"))
    assert f"Example: dragn-cache {command}" in re.sub(r"\s+", " ", text)


def test_version_and_no_arguments() -> None:
    assert re.fullmatch(r"dragn-cache \d+\.\d+\.\d+\n", ok("--version"))
    assert "Usage" in run().output


def test_devices_that_are_not_there_are_refused_by_every_command(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    for device in ("abacus", "meta", "cuda:99"):
        args = ["--store", store, "--out", tmp_path / "r", "--device", device]
        assert "--device: expected cpu" in refused("train-agg", *args)
        assert "--device: expected cpu" in refused("predict", trained, *args)
        assert "--device: expected cpu" in refused("evaluate", trained, *args)


def test_shipped_sets_without_their_files_say_what_to_put_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DRAGN_CACHE_DATA", str(tmp_path))
    line = refused("extract", "--dataset", "hpa", "--out", tmp_path / "s")
    assert f"put bags.csv and instances.csv into {tmp_path / 'hpa'}" in line
    assert "dragn-cache simulate --out" in refused("check", "simulated")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 74.5 GiB for an array with shape (10, 10)"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 160000000000 bytes. Error code 12"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_memory_that_is_short_is_one_line_with_what_to_do(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAGN_CACHE_DEBUG", "")

    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        guarded(command)()
    said = capsys.readouterr().err
    assert end.value.exit_code == 2
    assert said.startswith("error: memory: expected as much as this needs, got ")
    assert said.endswith("bags of fewer instances\n")
    assert said.count("\n") == 1


def test_real_allocations_that_fail_are_recognised() -> None:
    for allocate in (
        lambda: np.empty(10**16),
        lambda: torch.empty(10**16),
        lambda: bytearray(2**60),
    ):
        with pytest.raises((MemoryError, RuntimeError)) as error:
            allocate()
        assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
