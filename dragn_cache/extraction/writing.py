"""Writing behind the network: a thread that fills parts while the next batch computes."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.errors import DragnCacheError
from dragn_cache.extraction.forward import Forward, Pending
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.store import Failure, InstanceRecord, PartPlan, PartWriter, StoreWriter
from dragn_cache.types import Pixels

WAITING_BATCHES = 3  # batches that may wait for the writing thread


@dataclass(frozen=True)
class ComputedBatch:
    """A batch on its way to the store; `images` only to say which of them overflowed."""

    images: Pixels
    pending: Pending
    rows: list[int]
    records: list[InstanceRecord]
    view: str


class WritingThread:
    """The writing thread. What fails there is raised here, at the next call."""

    def __init__(self, writer: StoreWriter, report: ExtractReport) -> None:
        self._writer, self._report = writer, report
        self._queue: queue.Queue[Any] = queue.Queue(WAITING_BATCHES)
        self._put, self._written = 0, 0  # batches
        self._progress = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writing")

    def begin(self, part: PartPlan) -> None:
        self._give(part)

    def put(self, written: ComputedBatch, forward: Forward) -> None:
        self._put += 1
        self._give((written, forward))

    def settle(self) -> None:
        """Wait until the batches given so far are digested and on their way to the disk."""
        started = time.perf_counter()
        with self._progress:
            self._progress.wait_for(lambda: self._written == self._put or self._error is not None)
        self._report.stall_seconds += time.perf_counter() - started

    def fail(self, row: int, failure: Failure) -> None:
        self._give((row, failure))

    def complete(self) -> None:
        self._give(None)

    def _give(self, item: object) -> None:
        started = time.perf_counter()
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(item, timeout=0.2)
                break
            except queue.Full:
                continue
        self._report.stall_seconds += time.perf_counter() - started

    def _run(self) -> None:
        try:
            while isinstance(part := self._queue.get(), PartPlan):
                with self._writer.part(part) as target:
                    while (item := self._queue.get()) is not None:
                        if isinstance(item, _StopError):
                            raise item
                        self._write(target, *item)
                    started = time.perf_counter()
                self._report.write_seconds += time.perf_counter() - started
                self._report.parts_written += 1
        except _StopError:
            return
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            with self._progress:
                self._error = error
                self._progress.notify()

    def _write(self, target: PartWriter, what: Any, more: Any) -> None:
        if isinstance(more, Failure):
            target.fail(what, more)
            return
        started = time.perf_counter()
        values, finite = what.pending.arrays()
        ready = time.perf_counter()
        if not finite:
            _require_storable(target, what, more, values)
        count = len(what.rows)
        target.put(what.rows, what.records, {n: v[:count] for n, v in values.items()}, what.view)
        self._report.device_seconds += ready - started
        self._report.write_seconds += time.perf_counter() - ready
        with self._progress:
            self._written += 1
            self._progress.notify()

    def __enter__(self) -> WritingThread:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._thread.is_alive():
            try:
                self._queue.put(_StopError(), timeout=0.2)
                self._thread.join()
            except queue.Full:
                continue
        if error is None and self._error is not None:
            raise self._error


class _StopError(Exception):
    """Tells the writing thread to end; a part that is under way is dropped."""


def _require_storable(
    target: PartWriter, written: ComputedBatch, forward: Forward, values: dict[str, NDArray[Any]]
) -> None:
    """Raise `DragnCacheError` that names the bag and the tap of a value that is not finite."""
    exact = forward.backbone(torch.from_numpy(written.images).to(forward.device))
    for name, stored in values.items():
        bad = ~np.isfinite(stored.reshape(len(stored), -1))
        if not bad.any():
            continue
        first = int(np.flatnonzero(bad.any(axis=1))[0])
        value = exact[name].cpu().numpy().reshape(len(stored), -1)[first][bad[first]][0]
        row = written.rows[min(first, len(written.rows) - 1)]
        bag = target.bags[int(np.searchsorted(np.cumsum(target.sizes), row, "right"))]
        limit = np.finfo(stored.dtype).max
        raise DragnCacheError(
            f"bag {bag!r}, tap {name!r}",
            expected=f"finite values up to {limit:g} ({stored.dtype})",
            got=f"{value:g}",
            remedy="use `dtype=float32`"
            if np.isfinite(value)
            else "check the weights, `mean` and `std`",
        )
