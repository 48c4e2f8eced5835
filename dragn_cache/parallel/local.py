"""Work in other processes: tasks handed out, results as they come, arrays that all of them see.

- Processes start from a server that has imported what they need once, so that the second costs no
  second import of torch; they never import the main program.
- A process ends with its parent, even if that was killed, and at once where the parent stops early.
- `SharedArray` lies in anonymous memory: no name is left behind, and no limit of /dev/shm counts.
"""

from __future__ import annotations

import logging
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import DragnCacheError

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    work: Callable[[State, Task], Result],
    state: State,
    tasks: Sequence[Task],
    *,
    jobs: int,
    preload: Sequence[str],
) -> Iterator[Result]:
    """Do every task in one of several processes; results come in the order of their end.

    Args:
        work: a function of a module; what it raises ends its process.
        state: what all tasks share; it is sent once to each process.
        jobs: processes.
        preload: modules that their server imports.

    Raises:
        DragnCacheError: a process has ended before its task.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    waiting = iter(tasks)
    started: list[BaseProcess] = []
    busy: dict[Connection, Task] = {}
    try:
        for _, task in zip(range(jobs), waiting, strict=False):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, state), daemon=True)
            with light_main():
                process.start()
            started.append(process)
            theirs.close()
            _send(ours, task)
            busy[ours] = task
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                result = _result(connection, busy.pop(connection))
                for task in waiting:
                    _send(connection, task)
                    busy[connection] = task
                    break
                else:  # there are no more: so its process ends
                    connection.close()
                yield result
    finally:
        for child in started:  # they wait, or work for nobody
            child.kill()
        for child in started:
            child.join()


def _send(connection: Connection, task: object) -> None:
    with _talking_about(task):
        connection.send(task)


def _result(connection: Connection, task: object) -> Any:
    with _talking_about(task):
        return connection.recv()


@contextmanager
def _talking_about(task: object) -> Iterator[None]:
    """A worker that is no longer there is one error, whichever way it shows."""
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise DragnCacheError(
            f"worker process of {task}",
            expected="a result",
            got="its end (out of memory?)",
            remedy="run the same command again, with fewer `jobs` if it repeats",
        ) from error


def _serve(connection: Connection, work: Callable[[State, Task], Result], state: State) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    follow_parent()
    silence_libraries()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(work(state, task))


@contextmanager
def light_main() -> Iterator[None]:
    """Keep new processes from importing the main program, which they do not need.

    It may be anybody's script that imports torch: half a gigabyte and seconds for each worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def silence_libraries() -> None:
    """Keep libraries' warnings and logs from a process that has no one to read them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())  # else Python prints what no one handles


def follow_parent() -> None:
    """End this process when its parent ends, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class SharedArray:
    """An array that processes started later map as well, instead of copying it.

    Args:
        shape, dtype: of ``array``, which is full of zeros.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        descriptor = os.memfd_create("array")
        os.ftruncate(descriptor, max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
        self._map(descriptor, shape, dtype)

    def _map(self, descriptor: int, shape: tuple[int, ...], dtype: str) -> None:
        self._descriptor, self._dtype = descriptor, dtype
        weakref.finalize(self, os.close, descriptor)
        memory = mmap.mmap(descriptor, 0)
        count = int(np.prod(shape))
        self.array: NDArray[Any] = np.frombuffer(memory, dtype, count).reshape(shape)

    def __reduce__(self) -> tuple[object, ...]:
        return _attach, (DupFd(self._descriptor), self.array.shape, self._dtype)


def _attach(descriptor: Any, shape: tuple[int, ...], dtype: str) -> SharedArray:
    shared = SharedArray.__new__(SharedArray)
    shared._map(descriptor.detach(), shape, dtype)
    return shared
