"""SHA256SUMS: as ``sha256sum`` writes it, and compared before files are used."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dragn_cache.checksums import (
    CHECKSUMS,
    changed_files,
    read_checksums,
    require_unchanged,
    write_checksums,
)
from dragn_cache.errors import InputError

FILES = {"a.csv": b"x,y\n1,2\n", "b é.json": b"{}", "inner/c.bin": bytes(range(251)), "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_checksums(tmp_path)
    return tmp_path


def test_they_are_the_digests_of_the_files(folder: Path) -> None:
    by_hand = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert read_checksums(folder) == by_hand
    assert changed_files(folder, ()) == []
    write_checksums(folder)  # their own file is none of them
    assert read_checksums(folder) == by_hand


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_checks_them_and_writes_the_same(folder: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=folder, check=True)
    told = subprocess.run(["sha256sum", *sorted(FILES)], cwd=folder, stdout=-1, check=True).stdout
    assert told == (folder / CHECKSUMS).read_bytes()


def test_what_has_changed_is_named(folder: Path) -> None:
    require_unchanged(folder / "a.csv")
    (folder / "a.csv").write_bytes(b"x,y\n1,3\n")
    (folder / "inner" / "c.bin").unlink()
    (folder / "later.csv").touch()
    assert changed_files(folder, ()) == ["a.csv", "inner/c.bin"]
    assert changed_files(folder, ("a.csv", "later.csv", "none")) == [
        "later.csv",
        "a.csv",
        "inner/c.bin",
    ]
    with pytest.raises(InputError, match=r"a\.csv: expected the file as it was.*got other bytes"):
        require_unchanged(folder / "a.csv")
    with pytest.raises(InputError, match=r"later\.csv: .*got none of that name in SHA256SUMS"):
        require_unchanged(folder / "later.csv")


def test_a_folder_without_them_is_of_an_older_version(folder: Path) -> None:
    (folder / CHECKSUMS).unlink()
    (folder / "a.csv").write_bytes(b"other")
    assert read_checksums(folder) is None
    assert changed_files(folder, ("a.csv",)) == []
    require_unchanged(folder / "a.csv")


@pytest.mark.parametrize("change", ["cut", "case", "order", "not text", "another line", "blank"])
def test_another_text_is_refused(folder: Path, change: str) -> None:
    path = folder / CHECKSUMS
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_bytes(
        {
            "cut": text[:-1].encode(),
            "case": re.sub("[a-f]", lambda match: match[0].upper(), text, count=1).encode(),
            "order": "".join(reversed(lines)).encode(),
            "not text": text.encode() + b"\xff\n",
            "another line": (text + "# checked\n").encode(),
            "blank": (text + "\n").encode(),
        }[change]
    )
    with pytest.raises(InputError, match=r"SHA256SUMS: expected digests as sha256sum writes them"):
        read_checksums(folder)
