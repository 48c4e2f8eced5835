"""An ``--out`` that cannot be written is refused before the work, by every command that has one."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from command_line import ok, refused, run
from conftest import write_dataset
from dragn_cache_cli.app import COMMANDS, load_command
from run_stores import make_bags, make_features, with_splits, write_store

from dragn_cache.store import Store

WORDS = {
    "demo": [],
    "extract": ["--dataset", "data", "--weights", "none.pth"],
    "train-agg": ["--store", "s"],
    "crossval": ["--store", "s", "--aggregator", "mean", "--folds", 3],
    "evaluate": ["r", "--store", "s", "--split", "test"],
    "predict": ["r", "--store", "s"],
    "explain": ["r", "--store", "s"],
    "import": ["x"],
    "export": ["s", "--layout", "torchmil"],
    "simulate": [],
}
ONLY_ASKS = {"doctor"}  # about the disk that a store would be written to


@pytest.fixture
def unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with all that the commands read, and features that cannot be read."""
    monkeypatch.chdir(tmp_path)
    bags = with_splits(make_bags(20))
    write_store(tmp_path / "s", bags, make_features(bags))
    write_dataset(tmp_path / "data", [1, 2])
    train = ["--store", "s", "--epochs", 1, "--aggregator", "abmil", "--tap", "gap"]
    ok("train-agg", *train, "--out", "r")
    ok("export", "s", "--layout", "torchmil", "--tap", "gap", "--out", "x")
    (tmp_path / "x" / "features" / "003.npy").write_bytes(b"")
    (tmp_path / "file").touch()

    def fail(*args: object, **settings: object) -> None:
        raise OSError("the work has begun")

    monkeypatch.setattr(Store, "load", fail)
    monkeypatch.setattr(Store, "bag", fail)
    return tmp_path


def test_every_output_is_tried_before_the_work(unreadable: Path) -> None:
    names = {n for n in COMMANDS if "out" in inspect.signature(load_command(n)).parameters}
    assert names - ONLY_ASKS == set(WORDS)
    before = sorted(unreadable.rglob("*"))
    for name, words in WORDS.items():
        assert "file/out" in (line := refused(name, *words, "--out", "file/out")), name
        assert "a folder that can be written" in line, name
    assert sorted(unreadable.rglob("*")) == before
    for name in set(WORDS) - {"demo", "simulate"}:
        text = run(name, *WORDS[name], "--out", f"{name}-out").stderr
        assert any(w in text for w in ("the work has begun", "none.pth", "003.npy")), name
