"""Writing: a thread that fills parts with features while the next batch computes."""

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

WAITING_MESSAGES = 3  # that may wait for the writing thread


@dataclass(frozen=True)
class Begin:
    """A part begins."""

    part: PartPlan


@dataclass(frozen=True)
class Batch:
    """Instances whose features, in one view, are being computed.

    Attributes:
        images: what the network was given (N, P, h, w), to name a value that is not finite.
        features: of all N; those beyond ``rows`` filled the batch up and are not stored.
        rows: of the part; ``records``: what the part says about each.
    """

    images: Pixels
    features: Pending
    rows: list[int]
    records: list[InstanceRecord]
    view: str


@dataclass(frozen=True)
class Failed:
    """A row of the part that stays out, because its input cannot be used."""

    row: int
    failure: Failure


@dataclass(frozen=True)
class End:
    """The part has all its rows."""


@dataclass(frozen=True)
class Stop:
    """The thread ends; a part under way is dropped."""


Message = Begin | Batch | Failed | End | Stop


class WritingThread:
    """The writing thread. An error there is raised here, at the next call.

    Messages come part by part: `Begin`, any number of `Batch` and `Failed`, `End`.
    """

    def __init__(self, writer: StoreWriter, forward: Forward, report: ExtractReport) -> None:
        self._writer, self._forward, self._report = writer, forward, report
        self._queue: queue.Queue[Message] = queue.Queue(WAITING_MESSAGES)
        self._batches_given, self._batches_written = 0, 0
        self._progress = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writing")

    def give(self, message: Begin | Batch | Failed | End) -> None:
        """Hand a message over; waits while too many are waiting."""
        if isinstance(message, Batch):
            self._batches_given += 1
        started = time.perf_counter()
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(message, timeout=0.2)
                break
            except queue.Full:
                continue
        self._report.stall_seconds += time.perf_counter() - started

    def settle(self) -> None:
        """Wait until the batches given so far are digested and on their way to the disk."""
        started = time.perf_counter()
        with self._progress:
            self._progress.wait_for(
                lambda: self._batches_written == self._batches_given or self._error is not None
            )
        self._report.stall_seconds += time.perf_counter() - started

    def _run(self) -> None:
        try:
            while True:
                match self._queue.get():
                    case Begin(part):
                        self._write_part(part)
                    case Stop():
                        return
                    case message:
                        raise AssertionError(f"{message} outside a part")
        except _StoppedError:
            return
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            with self._progress:
                self._error = error
                self._progress.notify()

    def _write_part(self, part: PartPlan) -> None:
        with self._writer.part(part) as target:
            while True:
                match self._queue.get():
                    case Batch() as batch:
                        self._write_batch(target, batch)
                    case Failed(row, failure):
                        target.fail(row, failure)
                    case End():
                        break
                    case Stop():
                        raise _StoppedError
                    case Begin():
                        raise AssertionError(f"part {part.name} has no end")
            started = time.perf_counter()
        self._report.write_seconds += time.perf_counter() - started
        self._report.parts_written += 1

    def _write_batch(self, target: PartWriter, batch: Batch) -> None:
        started = time.perf_counter()
        values, finite = batch.features.arrays()
        ready = time.perf_counter()
        if not finite:
            _require_storable(target, batch, self._forward, values)
        count = len(batch.rows)
        stored = {name: value[:count] for name, value in values.items()}
        target.put(batch.rows, batch.records, stored, batch.view)
        self._report.device_seconds += ready - started
        self._report.write_seconds += time.perf_counter() - ready
        with self._progress:
            self._batches_written += 1
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
                self._queue.put(Stop(), timeout=0.2)
                self._thread.join()
            except queue.Full:
                continue
        if error is None and self._error is not None:
            raise self._error


class _StoppedError(Exception):
    """Leaves a part that is under way without completing it."""


def _require_storable(
    target: PartWriter, batch: Batch, forward: Forward, values: dict[str, NDArray[Any]]
) -> None:
    """Raise `DragnCacheError` that names the bag and the tap of a value that is not finite."""
    exact = forward.backbone(torch.from_numpy(batch.images).to(forward.device))
    for name, stored in values.items():
        bad = ~np.isfinite(stored.reshape(len(stored), -1))
        if not bad.any():
            continue
        first = int(np.flatnonzero(bad.any(axis=1))[0])
        value = exact[name].cpu().numpy().reshape(len(stored), -1)[first][bad[first]][0]
        row = batch.rows[min(first, len(batch.rows) - 1)]
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
