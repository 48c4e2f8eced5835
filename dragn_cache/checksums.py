"""``SHA256SUMS``: the digests of the files in a folder, as ``sha256sum`` writes and checks them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dragn_cache.errors import InputError, foreign
from dragn_cache.files import (
    MOST_TABLE_BYTES,
    file_sha256,
    is_unfinished,
    read_text,
    write_text,
)

CHECKSUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def checksums_text(digests: dict[str, str]) -> str:
    """The text of a ``SHA256SUMS``, from digests (hex) by the files' names."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def write_checksums(folder: Path) -> None:
    """Write the digests of all files below a folder, whose names are ours: no line ends in them."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not is_unfinished(path)]
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
    digests.pop(CHECKSUMS, None)
    write_text(folder / CHECKSUMS, checksums_text(digests))


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    return file_sha256(path).hex()


def read_checksums(folder: Path) -> dict[str, str] | None:
    """The digests by name, or None where there are none: files of older versions.

    Raises:
        InputError: the file is not as it was written.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    with foreign(path, expected="digests as sha256sum writes them", remedy=_remedy(path)):
        return parse_checksums(read_text(path, MOST_TABLE_BYTES))


def parse_checksums(text: str) -> dict[str, str]:
    """The digests that a text of ``SHA256SUMS`` gives; ValueError for any other text."""
    lines = text.split("\n")
    matches = [_LINE.fullmatch(line) for line in lines[:-1]]
    digests = {match[2]: match[1] for match in matches if match}
    if lines[-1] or text != checksums_text(digests):
        raise ValueError("other lines, another order, or a last line without its end")
    return digests


def changed_files(folder: Path, written: Sequence[str]) -> list[str]:
    """Names of files that are lost or hold other bytes than were written; none without digests.

    Args:
        written: names of files that, where they exist, must have a digest.
    """
    recorded = read_checksums(folder)
    if recorded is None:
        return []
    without = [name for name in written if name not in recorded and (folder / name).exists()]
    return without + [
        name
        for name, digest in recorded.items()
        if not (folder / name).is_file() or file_digest(folder / name) != digest
    ]


def require_unchanged(path: Path) -> None:
    """Raise `InputError` if a file is not as its folder's ``SHA256SUMS``, if any, has it."""
    recorded = read_checksums(path.parent)
    if recorded is None or recorded.get(path.name) == file_digest(path):
        return
    raise InputError(
        str(path),
        expected=f"the file as it was written ({CHECKSUMS} beside it has its digest)",
        got="other bytes" if path.name in recorded else f"none of that name in {CHECKSUMS}",
        remedy=_remedy(path.parent / CHECKSUMS),
    )


def _remedy(path: Path) -> str:
    return (
        "restore the file, or make the folder again; "
        f"if it was changed on purpose, write {path.name} anew with sha256sum"
    )
