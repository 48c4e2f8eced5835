"""Exports that meet a disk which refuses: one line, nothing left, and the same command goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import ok, refused
from file_limit import file_limit
from run_stores import make_bags, make_features, write_store

from dragn_cache.interop.layouts import TARGETS
from dragn_cache.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    bags = make_bags(17)
    return write_store(tmp_path_factory.mktemp("s") / "s", bags, make_features(bags, most=5))


def export(store: Store, layout: str, out: Path) -> list[object]:
    tap = [] if TARGETS[layout].holds_all else ["--tap", "gap"]
    return ["export", store.path, "--layout", layout, *tap, "--out", out]


@pytest.mark.parametrize("layout", list(TARGETS))
def test_an_export_meets_the_limit_of_a_files_size(
    store: Store, tmp_path: Path, layout: str
) -> None:
    command = export(store, layout, tmp_path / "out")
    for limit in (0, 100, 200):
        with file_limit(limit):
            line = refused(*command)
        assert "File too large" in line
        assert [p.name for p in tmp_path.iterdir() if p.suffix != ".claim"] == []
    ok(*command)
    ok("import", tmp_path / "out", "--layout", layout, "--out", tmp_path / "again")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 24 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("layout", list(TARGETS))
def test_an_export_meets_a_full_disk(store: Store, small_disk: Path, layout: str) -> None:
    command = export(store, layout, small_disk / "out")
    assert "No space left on device" in refused(*command)
    assert list(small_disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)
    ok(*command)
    assert [p.name for p in small_disk.iterdir()] == ["out"]
