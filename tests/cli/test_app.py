"""The program itself: its help, its version, and what every command refuses alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import ok, refused, run
from dragn_cache_cli.app import COMMANDS


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
