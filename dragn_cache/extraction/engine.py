"""The inside of an extraction: decoding, network and writing, all at once.

Worker processes decode the next images, this thread fills batches and runs the network, a writing
thread takes features back, digests them and completes parts. Beside a GPU all three go on together.
Where the network runs on the same cores they take turns: its threads wait for each other, so
whatever holds up one of them holds up all. The queues between them are bounded, so memory depends
on the batch size and not on the data. Batches are filled across bags but never across parts, so
that a part's bytes depend on the plan alone.

A part is one sequence of messages. Through the decoder: `Begin`, its images, `End`. To the writing
thread: `Begin`, `Batch` and `Failed` as they come, `End`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from dragn_cache.errors import ImageError
from dragn_cache.extraction.forward import Forward
from dragn_cache.extraction.plan import ExtractionPlan, PlannedImage
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.extraction.workers import Decoded, Decoder, FromDecoder, Mark, ToDecode
from dragn_cache.extraction.writing import Batch, Begin, End, Failed, WritingThread
from dragn_cache.images.crops import Crops
from dragn_cache.manifest import Instance
from dragn_cache.store import Failure, InstanceRecord, PartPlan, StoreWriter
from dragn_cache.types import Pixels


@dataclass
class _Waiting:
    """Crops of a part that wait for the network: one list of pixels for each view."""

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
        plan: its images, and what to do with those that cannot be used.
        forward: the network.
        writer: the store; its views decide how many crops an instance has.
        decoder: the pool of workers.
        advance: called with the number of instances that were done.
    """

    def __init__(
        self,
        plan: ExtractionPlan,
        forward: Forward,
        writer: StoreWriter,
        decoder: Decoder,
        report: ExtractReport,
        advance: Callable[[int], None],
    ) -> None:
        self.plan, self.forward, self.writer = plan, forward, writer
        self.decoder, self.report, self.advance = decoder, report, advance
        self.takes_turns = forward.device.type == "cpu"
        # Those of earlier calls count as well.
        self.failed = len(writer.failures()) if plan.config.max_errors is not None else 0

    def write(self, parts: Iterator[PartPlan]) -> int:
        """Write the parts given (each is taken when its images are about to be decoded).

        Returns:
            how many.
        """
        views, size = self.writer.description.views, self.forward.batch_size
        stream = self.decoder.stream(self._items(parts))
        parts_written = 0
        with (
            closing(stream),
            WritingThread(self.writer, self.forward, self.report) as writing,
        ):
            for item in stream:
                match item:
                    case Mark(Begin() as begin):
                        writing.give(begin)
                        waiting = _Waiting([[] for _ in views])
                        waiting_since = time.perf_counter()
                    case FromDecoder(image, decoded):
                        now = time.perf_counter()
                        self.report.wait_seconds += now - waiting_since
                        self._take(writing, waiting, image, decoded)
                        while len(waiting.rows) >= size:
                            self._forward(writing, waiting, size)
                        waiting_since = time.perf_counter()
                    case Mark(End() as end):
                        for rest_size in batch_sizes(len(waiting.rows), size):
                            self._forward(writing, waiting, rest_size)
                        writing.give(end)
                        parts_written += 1
        return parts_written

    def _items(
        self, parts: Iterator[PartPlan]
    ) -> Iterator[ToDecode[PlannedImage] | Mark[Begin | End]]:
        for part in parts:
            yield Mark(Begin(part))
            for image in self.plan.images_of(part):
                yield ToDecode(image, image.request)
            yield Mark(End())

    def _take(
        self, writing: WritingThread, waiting: _Waiting, image: PlannedImage, decoded: Decoded
    ) -> None:
        """Let an image's crops wait for the network, or record why they are missing."""
        self.report.images_decoded += 1
        if isinstance(decoded, ImageError):
            for row, instance in image.instances:
                self._fail(writing, row, instance, decoded)
            return
        self.report.decode_seconds += decoded.seconds
        self.report.add_levels(decoded.levels)
        k = 0
        for (row, instance), box in zip(image.instances, decoded.boxes, strict=True):
            if isinstance(box, str):
                error = ImageError(
                    f"{instance.file}:{instance.line} ({instance.image})",
                    expected="a box inside the image",
                    got=box,
                    remedy="correct the box",
                )
                self._fail(writing, row, instance, error)
                continue
            for view, pixels in enumerate(waiting.pixels):
                pixels.append(_crop(decoded, view, k, len(waiting.pixels)))
            k += 1
            waiting.rows.append(row)
            record = InstanceRecord(instance.image, box, instance.order, decoded.digest)
            waiting.records.append(record)

    def _fail(
        self, writing: WritingThread, row: int, instance: Instance, error: ImageError
    ) -> None:
        """Record an input that cannot be used, or raise if the settings say to stop."""
        self.failed += 1
        on_error, limit = self.plan.config.on_error, self.plan.config.max_errors
        if on_error == "stop" or (limit is not None and self.failed > limit):
            remedy = f"{error.remedy}, or extract with `on_error=skip`"
            if on_error == "skip":
                remedy = f"{self.failed} inputs failed: {error.remedy}, or raise `max_errors`"
            raise ImageError(
                f"bag {instance.bag_id!r}, {error.where}",
                expected=error.expected,
                got=error.got,
                remedy=remedy,
            )
        box = ",".join(map(str, instance.box)) if instance.box else ""
        writing.give(Failed(row, Failure(instance.bag_id, instance.image, box, str(error))))
        self.advance(1)

    def _forward(self, writing: WritingThread, waiting: _Waiting, size: int) -> None:
        """Run one batch of a fixed size, filled up by repeating its last instance."""
        count = min(size, len(waiting.rows))
        rows, records = waiting.rows[:count], waiting.records[:count]
        for view, pixels in zip(self.writer.description.views, waiting.pixels, strict=True):
            if self.takes_turns:
                self._settle(writing)
            started = time.perf_counter()
            images = np.stack(pixels[:count] + pixels[count - 1 : count] * (size - count))
            features = self.forward(images)
            self.report.forward_seconds += time.perf_counter() - started
            writing.give(Batch(images, features, rows, records, view))
            del pixels[:count]
        del waiting.rows[:count], waiting.records[:count]
        self.report.instances_done += count
        self.advance(count)

    def _settle(self, writing: WritingThread) -> None:
        """Let workers and the writing thread come to rest."""
        started = time.perf_counter()
        self.decoder.settle()
        self.report.wait_seconds += time.perf_counter() - started
        writing.settle()


def _crop(decoded: Crops, view: int, k: int, views: int) -> Pixels:
    """The k-th crop's pixels (P, H, W) in a view; all views of a crop follow each other."""
    pixels: Pixels = decoded.pixels[k * views + view]
    return pixels
