"""A file or folder that is made as a whole: claimed, written under a hidden name, renamed.

Two processes that make the same path do not both succeed; a process that dies, or a disk that
fills, leaves nothing at the path, and the same command can be repeated.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dragn_cache.errors import InputError
from dragn_cache.files import (
    is_full,
    is_unfinished,
    remove_tree,
    require_new,
    sync_folder,
    sync_tree,
    unwritable,
)
from dragn_cache.store.claims import Claims

SUFFIX = "new"
MARK = "dragn-cache.new"
"""A file in every scratch folder, which tells it from folders of others."""


@contextmanager
def new_path(out: Path, *, keep: str = "") -> Iterator[Path]:
    """A path to write to, which becomes ``out`` when the block ends without an error.

    Entering it shows that ``out`` can be made: long work belongs into the block.

    Args:
        out: a path where nothing is, or an empty folder; see `require_new`.
        keep: name of a file that the block may write beside the path: from then on what is
            unfinished is worth keeping. After an error or a kill the next call with this name finds
            both as they were.

    Raises:
        InputError: something is there, nothing can be written there, another process makes it, or
            the disk is full.
    """
    with claimed(out, keep=keep) as claims:
        require_new(out)
        with beside(out, claims, keep=keep) as unfinished:
            yield unfinished


@contextmanager
def claimed(out: Path, *, keep: str = "") -> Iterator[Claims]:
    """A path that no other process makes meanwhile; what dead ones left beside it is removed.

    Args:
        keep: as `new_path` takes it.

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
        for left in _left(out):
            if out.exists() or not _is_kept(left, keep):
                remove_tree(left)
        yield claims


def _left(out: Path) -> list[Path]:
    """Scratch folders of dead processes: a living one would hold the claim."""
    folders = out.parent.glob(f".{glob.escape(out.name)}.*.{SUFFIX}")
    return [folder for folder in folders if (folder / MARK).is_file()]


def _is_kept(folder: Path, keep: str) -> bool:
    return keep != "" and (folder / keep).is_file()


@contextmanager
def beside(out: Path, claims: Claims, *, keep: str = "") -> Iterator[Path]:
    """A path to write to, which becomes ``out``, claimed already, at the end of the block.

    Args:
        keep: as `new_path` takes it.
    """
    out = out.resolve()
    if out.is_mount():  # no folder can be renamed onto it
        raise InputError(
            str(out),
            expected="a path that can be made",
            got="a mounted file system",
            remedy="give a new folder in it as `out`",
        )
    scratch = out.parent / f".{out.name}.{claims.token}.{SUFFIX}"
    unfinished, is_done = scratch / out.name, False
    kept = [left for left in _left(out) if _is_kept(left, keep)]
    if kept:
        kept[0].rename(scratch)
        _remove_unfinished(unfinished)
    else:
        scratch.mkdir()
    try:
        (scratch / MARK).touch()
        yield unfinished
        sync_tree(unfinished)
        if out.is_dir():
            _remove_unfinished(out)
            out.rmdir()
        unfinished.rename(out)
        is_done = True
        sync_folder(out.parent)
    except OSError as error:
        if is_full(error):  # and may name a hidden file, or none
            raise unwritable(out, error) from error
        raise
    finally:
        if is_done or not _is_kept(scratch, keep):
            remove_tree(scratch)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if is_unfinished(path):
            path.unlink()
