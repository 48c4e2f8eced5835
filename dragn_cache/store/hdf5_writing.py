"""Writing an HDF5 file so that a disk which refuses is an OSError, and not the program's end.

When a write fails, h5py raises while it closes the file, cannot free its handles, and the process
may end by SIGSEGV. So HDF5 writes through a Python object here that keeps the first error for
itself; from then on HDF5 writes into nothing, closes its file in peace, and the error is raised.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py

Check = Callable[[], None]
"""Raises the error that the disk has given by now, so that long work ends with it."""


@contextmanager
def writing_hdf5(path: Path, mode: Literal["x", "r+"] = "x") -> Iterator[tuple[Any, Check]]:
    """An HDF5 file to write, new or (``r+``) one of before, and a `Check` for long work.

    Raises:
        OSError: the disk has refused something; the file is not whole.
    """
    with path.open("xb+" if mode == "x" else "rb+", buffering=0) as raw:
        output = _Output(raw)
        with h5py.File(output, "w" if mode == "x" else "r+") as file:
            yield file, output.check
        output.check()


class _Output:
    """A file as h5py's driver for Python's files uses one; its writes do not fail."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw, self._place = raw, 0
        self._error: OSError | None = None

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        self._place = place if whence == os.SEEK_SET else self._raw.seek(place, whence)
        return self._place

    def tell(self) -> int:
        return self._place

    def write(self, content: memoryview) -> int:
        left = memoryview(content).cast("B")
        size, at = len(left), self._place
        try:
            while len(left) and self._error is None:
                count = os.pwrite(self._raw.fileno(), left, at)
                left, at = left[count:], at + count
        except OSError as error:
            self._error = error
        self._place += size
        return size

    def readinto(self, target: memoryview) -> int:
        view = memoryview(target).cast("B")
        count = os.preadv(self._raw.fileno(), [view], self._place)
        view[count:] = bytes(len(view) - count)
        self._place += len(view)
        return len(view)

    def truncate(self, size: int) -> None:
        try:
            self._raw.truncate(size)
        except OSError as error:
            self._error = self._error or error

    def flush(self) -> None:
        """Nothing: whoever completes the file has the system write it out."""

    read = readinto  # h5py knows a file by this name, and does not call it
