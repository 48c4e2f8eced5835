"""Decoding ahead of the network: image requests in, crops out, in order, in worker processes.

Workers import no torch, hold no file handles of the store, and end when their parent does, even
if it was killed. What waits in the queue is bounded by a number of crops, so memory does not grow
with the data. Images travel in small groups: one message for several of them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Generic, TypeVar, final

from dragn_cache.errors import DragnCacheError, ImageError
from dragn_cache.images.crops import Crops, ImageRequest, read_crops
from dragn_cache.machine import usable_cores
from dragn_cache.parallel.local import follow_parent, light_main, silence_libraries

Decoded = Crops | ImageError
Tag = TypeVar("Tag")
Message = TypeVar("Message")

GROUP_CROPS = 8  # crops of one message, unless a single image has more
NICENESS = 19  # on the CPU: the network goes first
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
SETTLE_FACTOR, SETTLE_SECONDS = 2.0, 0.05  # see `Decoder.settle`


@final
@dataclass(frozen=True)
class ToDecode(Generic[Tag]):
    """An image to decode, with a tag by which the caller knows it again."""

    tag: Tag
    request: ImageRequest


@final
@dataclass(frozen=True)
class Mark(Generic[Message]):
    """A message between images, which comes back in its place."""

    message: Message


@final
@dataclass(frozen=True)
class FromDecoder(Generic[Tag]):
    """The crops of the image with a tag, or the error that makes it unusable."""

    tag: Tag
    decoded: Decoded


@final
@dataclass(frozen=True)
class _Group(Generic[Tag]):
    """Images that travel in one message, and their crops when a worker has decoded them."""

    images: list[ToDecode[Tag]]
    future: Future[list[Decoded]]

    @property
    def crops(self) -> int:
        return sum(len(image.request.boxes) for image in self.images)


class Decoder:
    """A pool of decoding processes, started at the first request.

    Args:
        workers: processes; 0 decodes in the caller.
        ahead_crops: how many crops may be decoded or under way beyond the one given out.
        give_way: run the workers at the lowest priority. Where the network computes on the same
            cores, it would otherwise share every one of them with a worker and wait for it.
    """

    def __init__(self, *, workers: int, ahead_crops: int, give_way: bool = False) -> None:
        self.workers, self.ahead_crops, self.give_way = workers, ahead_crops, give_way
        self._pool: ProcessPoolExecutor | None = None
        self._under_way: set[Future[list[Decoded]]] = set()
        self._crops, self._cpu_seconds = 0, 0.0  # of what has come back

    def stream(
        self, items: Iterable[ToDecode[Tag] | Mark[Message]]
    ) -> Generator[FromDecoder[Tag] | Mark[Message], None, None]:
        """Decode images in order; items are taken lazily.

        Args:
            items: images, and marks between them.

        Raises:
            DragnCacheError: a worker has died.
        """
        if self.workers == 0:
            for item in items:
                if isinstance(item, ToDecode):
                    yield FromDecoder(item.tag, attempt(item.request))
                else:
                    yield item
            return
        try:
            yield from self._stream_ahead(items)
        except BrokenProcessPool as error:
            raise DragnCacheError(
                "decoding",
                expected="worker processes that live",
                got="one that died (out of memory?)",
                remedy="run the same command again, with fewer `workers` if it repeats",
            ) from error

    def _stream_ahead(
        self, items: Iterable[ToDecode[Tag] | Mark[Message]]
    ) -> Iterator[FromDecoder[Tag] | Mark[Message]]:
        queue: deque[_Group[Tag] | Mark[Message]] = deque()
        crops = 0  # in the queue
        for item in self._submitted(items):
            queue.append(item)
            crops += item.crops if isinstance(item, _Group) else 0
            while crops > self.ahead_crops and len(queue) > self.workers:
                first = queue.popleft()
                crops -= first.crops if isinstance(first, _Group) else 0
                yield from self._results(first)
        for item in queue:
            yield from self._results(item)

    def _submitted(
        self, items: Iterable[ToDecode[Tag] | Mark[Message]]
    ) -> Iterator[_Group[Tag] | Mark[Message]]:
        """Neighbouring images in groups of about `GROUP_CROPS` crops, given to the workers."""
        images: list[ToDecode[Tag]] = []
        crops = 0
        for item in items:
            size = len(item.request.boxes) if isinstance(item, ToDecode) else 0
            if images and (not isinstance(item, ToDecode) or crops + size > GROUP_CROPS):
                yield _Group(images, self._submit([image.request for image in images]))
                images, crops = [], 0
            if isinstance(item, ToDecode):
                images.append(item)
                crops += size
            else:
                yield item
        if images:
            yield _Group(images, self._submit([image.request for image in images]))

    def start(self) -> None:
        """Start the workers, so that they are ready when the first image is wanted."""
        if self.workers and self._pool is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["dragn_cache.extraction.workers"])
            niceness = NICENESS if self.give_way else 0
            self._pool = ProcessPoolExecutor(self.workers, context, _begin_worker, (niceness,))
            for _ in range(self.workers):  # a call that finds none idle starts one
                self._submit([])

    def settle(self) -> None:
        """Wait until what is under way is decoded, so that the network has the cores to itself.

        No longer than that should take the processor: what is late waits for its files, and can
        do so while the network runs.
        """
        groups = list(self._under_way)
        if groups and self._crops:
            crops = len(groups) * GROUP_CROPS
            seconds = crops * self._cpu_seconds / self._crops / min(self.workers, usable_cores())
            wait_for(groups, timeout=SETTLE_FACTOR * seconds + SETTLE_SECONDS)

    def _submit(self, group: Sequence[ImageRequest]) -> Future[list[Decoded]]:
        self.start()
        assert self._pool is not None
        with light_main():
            future = self._pool.submit(_attempt_all, group)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)  # it holds its images
        return future

    def _results(
        self, item: _Group[Tag] | Mark[Message]
    ) -> Iterator[FromDecoder[Tag] | Mark[Message]]:
        """A group's images with their crops, when the workers have them; a mark as it is."""
        if not isinstance(item, _Group):
            yield item
            return
        results = item.future.result()
        for decoded in results:
            if isinstance(decoded, Crops):
                self._crops += len(decoded.boxes)
                self._cpu_seconds += decoded.cpu_seconds
        for image, decoded in zip(item.images, results, strict=True):
            yield FromDecoder(image.tag, decoded)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _attempt_all(requests: Sequence[ImageRequest]) -> list[Decoded]:
    return [attempt(request) for request in requests]


def attempt(request: ImageRequest) -> Decoded:
    """An image's crops, or the error that makes it unusable."""
    try:
        return read_crops(request)
    except ImageError as error:
        return error


def _begin_worker(niceness: int) -> None:
    """Give way, keep memory, leave Ctrl-C to the parent, and end when it ends."""
    os.nice(niceness)
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()
    silence_libraries()


def _keep_memory() -> None:
    """Have glibc keep memory that images let go for the next ones, instead of giving it back.

    New pages from the system for every image of 1024² took 40 % of the time of decoding it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, size in ((M_MMAP_THRESHOLD, 32 * 2**20), (M_TRIM_THRESHOLD, 256 * 2**20)):
            mallopt(option, size)
