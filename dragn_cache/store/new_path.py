"""A file or folder that is made as a whole: claimed, written under a hidden name, renamed.

Two processes that make the same path do not both succeed; a process that dies, or a disk that
fills, leaves nothing at the path, and the same command can be repeated.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dragn_cache.errors import InputError
from dragn_cache.files import is_unfinished, require_new, sync_folder, sync_tree, unwritable
from dragn_cache.store.claims import Claims

SUFFIX = "new"
MARK = "dragn-cache.new"
"""A file in every scratch folder, which tells it from folders of others."""


@contextmanager
def new_path(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``out`` when the block ends without an error.

    Entering it shows that ``out`` can be made: long work belongs into the block.

    Args:
        out: a path where nothing is, or an empty folder; see `require_new`.

    Raises:
        InputError: something is there, nothing can be written there, or another process makes it.
    """
    with claimed(out) as claims:
        require_new(out)
        with beside(out, claims) as unfinished:
            yield unfinished


@contextmanager
def claimed(out: Path) -> Iterator[Claims]:
    """A path that no other process makes meanwhile; what dead ones left beside it is removed.

    Raises:
        InputError: another process makes it, or nothing can be written beside it.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        claims = Claims(out.parent)
        is_ours = claims.acquire(f"{out.name}.{SUFFIX}")
    except OSError as error:
        raise unwritable(out, error) from error
    with claims:
        if not is_ours:
            raise InputError(
                str(out),
                expected="a path that nobody else writes to",
                got="another process that makes it",
                remedy="let it finish, or give another `out`",
            )
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.{SUFFIX}"):
            if (left / MARK).is_file():  # of a killed process: a living one would hold the claim
                shutil.rmtree(left, ignore_errors=True)
        yield claims


@contextmanager
def beside(out: Path, claims: Claims) -> Iterator[Path]:
    """A path to write to, which becomes ``out``, claimed already, at the end of the block."""
    out = out.resolve()
    if out.is_mount():  # no folder can be renamed onto it
        raise InputError(
            str(out),
            expected="a path that can be made",
            got="a mounted file system",
            remedy="give a new folder in it as `out`",
        )
    scratch = out.parent / f".{out.name}.{claims.token}.{SUFFIX}"
    scratch.mkdir()
    try:
        (scratch / MARK).touch()
        unfinished = scratch / out.name
        yield unfinished
        sync_tree(unfinished)
        _make_way(out)
        unfinished.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make_way(out: Path) -> None:
    """Remove an empty folder, or one with unfinished files alone."""
    if out.is_dir():
        for path in out.iterdir():
            if is_unfinished(path):
                path.unlink()
        out.rmdir()
