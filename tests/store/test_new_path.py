"""Files and folders that are made as a whole, or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dragn_cache.errors import InputError
from dragn_cache.store.new_path import MARK, new_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(out: Path, text: str = "x") -> None:
    with new_path(out) as path:
        path.mkdir()
        (path / "a").write_text(text)


def test_it_is_there_when_the_block_ends_and_nothing_else_is(tmp_path: Path) -> None:
    make(tmp_path / "deep" / "out")
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["a"]


def test_an_error_leaves_nothing_and_the_same_goes_on(tmp_path: Path) -> None:
    def fill_the_disk(path: Path) -> None:
        path.mkdir()
        (path / "a").write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"), new_path(tmp_path / "out") as path:
        fill_the_disk(path)
    assert names(tmp_path) == []
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_told_with_the_path_and_other_errors_are_not_changed(tmp_path: Path) -> None:
    full = pytest.raises(InputError, match=r"out: .* got No space left on device; free space or")
    with full, new_path(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    with pytest.raises(PermissionError, match="secret"), new_path(tmp_path / "out"):
        raise PermissionError(13, "Permission denied", "secret")
    assert names(tmp_path) == []


def test_an_empty_folder_or_one_of_unfinished_files_makes_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".metrics.json.12.tmp").touch()
    make(out)
    assert names(out) == ["a"]


def test_only_one_of_two_makes_it(tmp_path: Path) -> None:
    with new_path(tmp_path / "out") as path:
        path.mkdir()
        with pytest.raises(InputError, match="expected a path that nobody else writes to"):
            make(tmp_path / "out", "other")
    assert names(tmp_path) == ["out"]


def test_what_a_killed_process_left_is_removed_and_folders_of_others_are_not(
    tmp_path: Path,
) -> None:
    code = (
        "import os; from pathlib import Path\n"
        "from dragn_cache.store.new_path import new_path\n"
        f"with new_path(Path({str(tmp_path / 'out')!r})) as path:\n"
        "    path.mkdir(); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (left,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert (left / MARK).exists()
    (tmp_path / ".out.4567.new").mkdir()
    make(tmp_path / "out")
    assert names(tmp_path) == [".out.4567.new", "out"]


def test_what_is_left_of_a_process_killed_at_the_very_end_goes_when_the_path_is_refused(
    tmp_path: Path,
) -> None:
    code = (
        "import os; from pathlib import Path; from dragn_cache.store import new_path\n"
        "new_path.sync_folder = lambda folder: os._exit(9)\n"  # the rename was the step before
        f"with new_path.new_path(Path({str(tmp_path / 'out')!r})) as path:\n"
        "    path.mkdir(); (path / 'a').touch()\n"
        "    new_path.sync_tree = lambda path: None\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert len(names(tmp_path)) == 3
    with pytest.raises(InputError, match="expected a new folder, got one with files"):
        make(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="got one in a file"), new_path(tmp_path / "file" / "out"):
        raise AssertionError("the work began")


def test_a_folder_by_another_name_is_made_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    make(tmp_path / "link")
    monkeypatch.chdir(tmp_path / "here")
    make(Path())
    assert names(tmp_path / "here") == names(tmp_path / "there") == ["a"]
    assert names(tmp_path) == ["here", "link", "there"]


def test_a_mounted_folder_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(InputError, match="a mounted file system"), new_path(tmp_path / "out"):
        raise AssertionError("the work began")
    assert names(tmp_path) == ["out"]
