"""The inside of an extraction: decode ahead, run the network, write behind, all at once.

Worker processes decode the next images, this thread fills batches and runs the network, a writing
thread takes features back, digests them and completes parts. Beside a GPU all three go on together.
Where the network runs on the same cores they take turns: its threads wait for each other, so
whatever holds up one of them holds up all. What lies between them is bounded, so memory depends on
the batch size and not on the data. Batches are filled across bags but never across parts, so that
a part's bytes depend on the plan alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.compute import Forward, Pending
from dragn_cache.decode import Decoded, Decoder
from dragn_cache.errors import DragnCacheError, ImageError
from dragn_cache.images import Crops, ImageRequest
from dragn_cache.manifest import Instance
from dragn_cache.report import ExtractReport
from dragn_cache.store import Failure, InstanceRecord, PartPlan, PartWriter, StoreWriter

Pixels = NDArray[np.uint8]
BEHIND = 3  # batches that may wait for the writing thread


@dataclass(frozen=True)
class Wanted:
    """One image to decode, and the rows of its part that its crops become."""

    request: ImageRequest
    instances: tuple[tuple[int, Instance], ...]


@dataclass(frozen=True)
class Policy:
    """What to do with inputs that cannot be used.

    Attributes:
        on_error: ``stop`` or ``skip``.
        max_errors: with ``skip``, stop when more than so many inputs were not used; None is any.
    """

    on_error: str
    max_errors: int | None


@dataclass
class _Batch:
    """Crops that wait for the network: one list of pixels for each view."""

    pixels: list[list[Pixels]]
    rows: list[int] = field(default_factory=list)
    records: list[InstanceRecord] = field(default_factory=list)


def batch_sizes(count: int, batch: int) -> list[int]:
    """Sizes of the forward passes for ``count`` instances: full batches, then the smallest of
    b, b/2, b/4, b/8 that holds the rest (filled up by repetition)."""
    full, rest = divmod(count, batch)
    sizes = [batch] * full
    if rest:
        sizes.append(min(s for k in (1, 2, 4, 8) if (s := max(1, batch // k)) >= rest))
    return sizes


class Engine:
    """Writes parts of a store.

    Args:
        wanted: gives a part's images, in the order in which they are decoded.
        forward: the network.
        writer: the store; its views decide how many crops an instance has.
        decoder: the pool of workers.
        advance: called with the number of instances that were done.
    """

    def __init__(
        self,
        wanted: Callable[[PartPlan], Sequence[Wanted]],
        forward: Forward,
        writer: StoreWriter,
        decoder: Decoder,
        policy: Policy,
        report: ExtractReport,
        advance: Callable[[int], None],
    ) -> None:
        self.wanted, self.forward, self.writer, self.decoder = wanted, forward, writer, decoder
        self.policy, self.report, self.advance = policy, report, advance
        self.size = forward.batch_size
        self.takes_turns = forward.device.type == "cpu"
        self.failed = 0

    def write(self, parts: Iterator[PartPlan]) -> int:
        """Write the parts given (each is taken when its images are about to be decoded).

        Returns:
            how many.
        """
        stream = self.decoder.stream(self._requests(parts))
        written = 0
        with closing(stream), _Behind(self.writer, self.report) as behind:
            for (part, wanted), decoded in stream:
                if not isinstance(wanted, Wanted):  # the part begins, or it is complete
                    if wanted == "begin":
                        behind.begin(part)
                        batch = _Batch([[] for _ in self.writer.description.views])
                        since = time.perf_counter()
                    else:
                        for size in batch_sizes(len(batch.rows), self.size):
                            self._forward(behind, batch, size)
                        behind.complete()
                        written += 1
                    continue
                now = time.perf_counter()
                self.report.wait_seconds += now - since
                assert decoded is not None  # only marks come back without
                self._take(behind, batch, wanted, decoded)
                while len(batch.rows) >= self.size:
                    self._forward(behind, batch, self.size)
                since = time.perf_counter()
        return written

    def _requests(
        self, parts: Iterator[PartPlan]
    ) -> Iterator[tuple[tuple[PartPlan, Wanted | str], ImageRequest | None]]:
        for part in parts:
            yield (part, "begin"), None
            for wanted in self.wanted(part):
                yield (part, wanted), wanted.request
            yield (part, "end"), None

    def _take(self, behind: _Behind, batch: _Batch, wanted: Wanted, decoded: Decoded) -> None:
        """Put an image's crops into the batch, or record why they are missing."""
        self.report.images_decoded += 1
        if isinstance(decoded, ImageError):
            for row, instance in wanted.instances:
                self._fail(behind, row, instance, decoded)
            return
        self.report.decode_seconds += decoded.seconds
        k = 0
        for (row, instance), box in zip(wanted.instances, decoded.boxes, strict=True):
            if isinstance(box, str):
                error = ImageError(
                    f"{instance.file}:{instance.line} ({instance.image})",
                    expected="a box inside the image",
                    got=box,
                    remedy="correct the box",
                )
                self._fail(behind, row, instance, error)
                continue
            for view, pixels in enumerate(batch.pixels):
                pixels.append(_crop(decoded, view, k, len(batch.pixels)))
            k += 1
            batch.rows.append(row)
            record = InstanceRecord(instance.image, box, instance.order, decoded.digest)
            batch.records.append(record)

    def _fail(self, behind: _Behind, row: int, instance: Instance, error: ImageError) -> None:
        self.failed += 1
        limit = self.policy.max_errors
        if self.policy.on_error == "stop" or (limit is not None and self.failed > limit):
            remedy = f"{error.remedy}, or extract with --on-error skip"
            if self.policy.on_error == "skip":
                remedy = f"{self.failed} inputs failed: {error.remedy}, or raise --max-errors"
            raise ImageError(
                f"bag {instance.bag_id!r}, {error.where}",
                expected=error.expected,
                got=error.got,
                remedy=remedy,
            )
        box = ",".join(map(str, instance.box)) if instance.box else ""
        behind.fail(row, Failure(instance.bag_id, instance.image, box, str(error)))
        self.advance(1)

    def _forward(self, behind: _Behind, batch: _Batch, size: int) -> None:
        """Run one batch of a fixed size, filled up by repeating its last instance."""
        count = min(size, len(batch.rows))
        for view, pixels in zip(self.writer.description.views, batch.pixels, strict=True):
            if self.takes_turns:
                self._settle(behind)
            started = time.perf_counter()
            images = np.stack(pixels[:count] + pixels[count - 1 : count] * (size - count))
            pending = self.forward(images)
            self.report.forward_seconds += time.perf_counter() - started
            rows, records = batch.rows[:count], batch.records[:count]
            behind.put(_Written(images, pending, rows, records, view), self.forward)
            del pixels[:count]
        del batch.rows[:count], batch.records[:count]
        self.report.instances_done += count
        self.advance(count)

    def _settle(self, behind: _Behind) -> None:
        """Let workers and the writing thread come to rest."""
        started = time.perf_counter()
        self.decoder.settle()
        self.report.wait_seconds += time.perf_counter() - started
        behind.settle()


def _crop(decoded: Crops, view: int, k: int, views: int) -> Pixels:
    """The k-th crop's pixels (P, H, W) in a view; all views of a crop follow each other."""
    pixels: Pixels = decoded.pixels[k * views + view]
    return pixels


@dataclass(frozen=True)
class _Written:
    """A batch on its way to the store; `images` only to say which of them overflowed."""

    images: Pixels
    pending: Pending
    rows: list[int]
    records: list[InstanceRecord]
    view: str


class _Behind:
    """The writing thread. What fails there is raised here, at the next call."""

    def __init__(self, writer: StoreWriter, report: ExtractReport) -> None:
        self._writer, self._report = writer, report
        self._queue: queue.Queue[Any] = queue.Queue(BEHIND)
        self._put, self._written = 0, 0  # batches
        self._progress = threading.Condition()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writing")

    def begin(self, part: PartPlan) -> None:
        self._give(part)

    def put(self, written: _Written, forward: Forward) -> None:
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
            _refuse_values(target, what, more, values)
        count = len(what.rows)
        target.put(what.rows, what.records, {n: v[:count] for n, v in values.items()}, what.view)
        self._report.device_seconds += ready - started
        self._report.write_seconds += time.perf_counter() - ready
        with self._progress:
            self._written += 1
            self._progress.notify()

    def __enter__(self) -> _Behind:
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


def _refuse_values(
    target: PartWriter, written: _Written, forward: Forward, values: dict[str, NDArray[Any]]
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
            remedy="use --dtype float32"
            if np.isfinite(value)
            else "check the weights and --mean, --std",
        )
