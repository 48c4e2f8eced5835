"""The disk that a store is written to: whether it takes files, and the error where it does not."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from dragn_cache.errors import StoreError


def require_writable(out: Path) -> None:
    """Raise `StoreError` unless files can be made in a folder, or where it is to be made."""
    place = out.resolve()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise disk_error(out, error) from error


def disk_error(out: Path, error: OSError) -> StoreError:
    """The error to raise where the system refused to write a store."""
    # HDF5 buries the system's own words in a long line of its own.
    buried = re.search(r"error message = '([^']+)'", str(error))
    return StoreError(
        str(out),
        expected="a folder that can be written",
        got=buried[1] if buried else error.strerror or str(error),
        remedy="free space or correct the rights, then run the same command again; "
        "finished parts are kept",
    )
