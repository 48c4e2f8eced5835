"""The inside of an extraction: decode ahead, run the network, write behind, all at once.

Worker processes decode the next images, this thread fills batches and runs the network, a writing
thread takes features back, digests them and completes parts. Beside a GPU all three go on together.
Where the network runs on the same cores they take turns: its threads wait for each other, so
whatever holds up one of them holds up all. What lies between them is bounded, so memory depends on
the batch size and not on the data. Batches are filled across bags but never across parts, so that
a part's bytes depend on the plan alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from dragn_cache.errors import ImageError
from dragn_cache.extraction.forward import Forward
from dragn_cache.extraction.plan import Wanted
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.extraction.workers import Decoded, Decoder
from dragn_cache.extraction.writing import ComputedBatch, WritingThread
from dragn_cache.images.crops import Crops, ImageRequest
from dragn_cache.manifest import Instance
from dragn_cache.store import Failure, InstanceRecord, PartPlan, StoreWriter
from dragn_cache.types import Pixels


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
        with closing(stream), WritingThread(self.writer, self.report) as behind:
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

    def _take(self, behind: WritingThread, batch: _Batch, wanted: Wanted, decoded: Decoded) -> None:
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

    def _fail(self, behind: WritingThread, row: int, instance: Instance, error: ImageError) -> None:
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

    def _forward(self, behind: WritingThread, batch: _Batch, size: int) -> None:
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
            behind.put(ComputedBatch(images, pending, rows, records, view), self.forward)
            del pixels[:count]
        del batch.rows[:count], batch.records[:count]
        self.report.instances_done += count
        self.advance(count)

    def _settle(self, behind: WritingThread) -> None:
        """Let workers and the writing thread come to rest."""
        started = time.perf_counter()
        self.decoder.settle()
        self.report.wait_seconds += time.perf_counter() - started
        behind.settle()


def _crop(decoded: Crops, view: int, k: int, views: int) -> Pixels:
    """The k-th crop's pixels (P, H, W) in a view; all views of a crop follow each other."""
    pixels: Pixels = decoded.pixels[k * views + view]
    return pixels
