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
from dragn_cache.files import is_unfinished, sync_folder, sync_tree
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
        InputError: another process is making ``out``.
        OSError: nothing can be written there.
    """
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with Claims(parent) as claims:
        if not claims.acquire(f"{out.name}.{SUFFIX}"):
            raise InputError(
                str(out),
                expected="a path that nobody else writes to",
                got="another process that makes it",
                remedy="let it finish, or give another `out`",
            )
        for left in parent.glob(f".{glob.escape(out.name)}.*.{SUFFIX}"):
            if (left / MARK).is_file():  # of a killed process: a living one would hold the claim
                shutil.rmtree(left, ignore_errors=True)
        scratch = parent / f".{out.name}.{claims.token}.{SUFFIX}"
        scratch.mkdir()
        try:
            (scratch / MARK).touch()
            unfinished = scratch / out.name
            yield unfinished
            sync_tree(unfinished)
            _make_way(out)
            unfinished.rename(out)
            sync_folder(parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _make_way(out: Path) -> None:
    """Remove an empty folder, or one with unfinished files alone."""
    if out.is_dir() and not out.is_symlink():
        for path in out.iterdir():
            if is_unfinished(path):
                path.unlink()
        out.rmdir()
