"""Work in other processes: every task once, shared arrays, and an end that is noticed."""

from __future__ import annotations

import os
import threading
import time
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import pytest

from dragn_cache.errors import DragnCacheError
from dragn_cache.parallel import local
from dragn_cache.parallel.local import SharedArray, run_tasks


def add(shared: SharedArray, row: int) -> tuple[int, float]:
    """The sum of a row; the last takes long, a negative one ends the process."""
    if row < 0:
        os._exit(7)
    if row == len(shared.array) - 1:
        time.sleep(0.3)
    return row, float(shared.array[row].sum())


def test_tasks_read_one_array_and_come_back_once(capfd: pytest.CaptureFixture[str]) -> None:
    shared = SharedArray((7, 3), "float16")
    shared.array[:] = np.arange(21).reshape(7, 3)
    found = []
    for result in run_tasks(add, shared, range(7), jobs=2, preload=["numpy"]):
        found.append(result)
        time.sleep(0.1)  # one process has nothing left to do by the last: it ends without a word
    assert sorted(found) == [(row, 9.0 * row + 3) for row in range(7)]
    assert capfd.readouterr().err == ""


def test_a_process_that_ends_early_is_named() -> None:
    shared = SharedArray((2, 3), "float32")
    assert not shared.array.any()
    with pytest.raises(DragnCacheError, match=r"worker process of -5.*fewer `jobs`"):
        list(run_tasks(add, shared, [-5], jobs=1, preload=["numpy"]))


def answer_and_end(parent: int, task: int) -> int:
    """A result, and the end of the process as soon as that has been sent."""
    threading.Timer(0.1, os._exit, [7]).start()
    return task


def test_a_process_that_ends_between_tasks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(connections: Any) -> Any:
        ready = wait(connections)
        time.sleep(0.5)  # the process has ended when its next task is sent
        return ready

    monkeypatch.setattr(local, "wait", late)
    with pytest.raises(DragnCacheError, match=r"worker process of 2.*fewer `jobs`"):
        list(run_tasks(answer_and_end, 0, [1, 2], jobs=1, preload=["numpy"]))
