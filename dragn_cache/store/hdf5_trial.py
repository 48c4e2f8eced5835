"""Reading an HDF5 file of others, first in a process that may die.

On damaged or hostile bytes libhdf5 may run for ever, or end its process (docs/log.md), and no
exception tells of it. So another process opens the file first, looks through all of its objects
and reads what HDF5 follows through the file to find: attributes, texts, the places and filters of
chunks. It has limits of processor time and memory. One process serves all files of this one; it
imports neither the main module nor anything from the working directory.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dragn_cache.errors import DragnCacheError, InputError, foreign
from dragn_cache.files import require_regular, require_room
from dragn_cache.store.hdf5_links import leading_out
from dragn_cache.store.part import Array

CPU_SECONDS = 3
BYTES_A_SECOND = 2 * 2**20  # of the file: the limit of processor time rises with it
MEMORY_BYTES = 2 * 2**30
SMALL_BYTES = 2**20  # of numbers; what is larger is read at its two ends
TEXTS = 2**12  # that are read at once
ANSWERS = 2**17  # that are kept
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {0} as t; t.serve()"


@contextmanager
def open_alone(path: Path) -> Iterator[Any]:
    """An HDF5 file of others, opened to be read: HDF5 survives it, and all its data lie in it.

    Raises:
        InputError: a link or a dataset in it leads to other files.
        ValueError: HDF5 cannot look through it, or ends its process.
    """
    require_regular(path)
    found = try_reading(path, lock=True)
    if found is not None:
        raise InputError(
            str(path),
            expected="a file that holds all of its data",
            got=", ".join(found),
            remedy="copy the data into the file, as h5repack and h5copy do",
        )
    with h5py.File(path, "r") as file:
        yield file


def read_whole(dataset: Any, *, text: bool = False) -> Array:
    """All values of a dataset, if there is room: one without any chunk has no bytes in the file,
    and as many of its fill value as its shape says."""
    require_room(dataset.size * dataset.dtype.itemsize)
    return np.asarray(dataset.asstr()[...] if text else dataset[...])


def try_reading(path: Path, *, lock: bool) -> tuple[str, str] | None:
    """Have another process read an HDF5 file; the name and kind of what leads out of it, if any.

    Of a file that cannot be opened at all, the caller will find the reason.

    Args:
        lock: give way to a program that still writes the file.

    Raises:
        ValueError: HDF5 cannot look through it, or ends its process.
    """
    require_regular(path)
    facts = path.stat()
    state = facts.st_ino, facts.st_size, facts.st_mtime_ns
    answer = _answer_of(str(path.absolute()), lock, *state)
    if "unopened" in answer:
        _answer_of.cache_clear()  # it may be another program's for a moment
    if "error" in answer:
        raise ValueError(answer["error"])
    return tuple(answer["leading_out"]) if "leading_out" in answer else None


@lru_cache(ANSWERS)  # an import opens each of its files several times
def _answer_of(path: str, lock: bool, number: int, size: int, changed_ns: int) -> dict[str, Any]:
    key = os.getpid()  # a process that was forked from this one has no part in its talk
    with _LOCK:
        trial = _TRIALS.get(key)
        if trial is not None and not trial.is_alive():
            trial.close()
            trial = None
        if trial is None:
            trial = _TRIALS[key] = _Trial()
        return trial.ask(path, lock, CPU_SECONDS + size // BYTES_A_SECOND)


class _Trial:
    """The process that reads files first, as it is seen from here."""

    def __init__(self) -> None:
        words = [sys.executable, "-P", "-c", START.format(__name__), json.dumps(sys.path)]
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        if not self._from.readline():
            self.close()
            raise DragnCacheError(
                "the process that reads HDF5 files first",
                expected="its start",
                got=_ending(self._process.returncode),
                remedy="run the same command again, with more memory if it repeats",
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, path: str, lock: bool, seconds: int) -> dict[str, Any]:
        question = json.dumps({"path": path, "lock": lock, "seconds": seconds})
        with suppress(BrokenPipeError):
            self._to.write(question.encode() + b"\n")
            self._to.flush()
        line = self._from.readline()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        code = self._process.returncode
        if code == -signal.SIGXCPU:
            return {"error": f"bytes that HDF5 reads without an end (stopped after {seconds} s)"}
        return {"error": f"bytes on which HDF5 ends its process ({_ending(code)})"}

    def close(self) -> None:
        """End the process, which ends by itself when it is not asked any more."""
        with suppress(BrokenPipeError):
            self._to.close()
        self._process.wait()
        self._from.close()


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


_TRIALS: dict[int, _Trial] = {}
_LOCK = threading.Lock()


@atexit.register
def _close() -> None:
    trial = _TRIALS.pop(os.getpid(), None)
    if trial is not None:
        trial.close()


# --- in that process ----------------------------------------------------------------------------


def serve() -> None:
    """Read the files that are asked about, one after the other, until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_AS, _address_space() + MEMORY_BYTES)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        question = json.loads(line)
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + question["seconds"])
        answers.write(json.dumps(_answer(Path(question["path"]), question["lock"])) + "\n")
        answers.flush()


def _limit(kind: int, value: int) -> None:
    """Set a soft limit, which leaves room to raise it again."""
    most = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _address_space() -> int:
    try:
        pages = Path("/proc/self/statm").read_text().split()[0]
    except OSError:  # another system than Linux
        return 2**33
    return int(pages) * resource.getpagesize()


def _answer(path: Path, lock: bool) -> dict[str, Any]:
    with suppress(Exception), h5py.File(path, "r", locking=None if lock else False) as file:
        try:
            size = path.stat().st_size
            with foreign(path, expected="an HDF5 file", remedy="make it again"):
                found = next(leading_out(file, lambda inner: _read(inner, size)), None)
        except InputError as error:
            return {"error": error.got}
        return {} if found is None else {"leading_out": found}
    return {"unopened": True}


def _read(inner: Any, file_bytes: int) -> None:
    """Read an object's attributes and texts, and of numbers what shows whether they can be read.

    A value that has an error of its own may be one that nobody wants. Texts are different: where
    memory did not suffice for them, it would not suffice for the caller.
    """
    kinds = {h5py.h5d.DatasetID: h5py.Dataset, h5py.h5g.GroupID: h5py.Group}
    opened = kinds.get(type(inner), h5py.Datatype)(inner)
    with suppress(Exception):
        for name in opened.attrs:
            with suppress(Exception):
                opened.attrs[name]
    has_texts = False
    with suppress(Exception):
        if isinstance(opened, h5py.Dataset):
            has_texts = opened.dtype.hasobject
            _read_numbers(opened)
    if has_texts:
        _read_texts(opened, file_bytes)


def _read_numbers(dataset: Any) -> None:
    if dataset.chunks is not None:
        dataset.id.get_num_chunks()  # looks through their index
    if dataset.dtype.hasobject or not dataset.size:
        return
    if dataset.size * dataset.dtype.itemsize <= SMALL_BYTES:
        dataset[()]
        return
    for place in ((0,) * dataset.ndim, tuple(n - 1 for n in dataset.shape)):
        dataset[place]


def _read_texts(dataset: Any, file_bytes: int) -> None:
    """Raise ValueError for texts that are longer than the file which should hold each of them."""
    if not dataset.size:
        return
    if not dataset.shape:
        dataset[()]
        return
    left = file_bytes
    step = max(1, TEXTS * len(dataset) // dataset.size)
    for start in range(0, len(dataset), step):
        values = dataset[start : start + step].ravel()
        left -= sum(len(value) for value in values if isinstance(value, bytes))
        if left < 0:
            raise ValueError("texts that are longer than the file")
