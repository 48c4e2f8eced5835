"""Decoding ahead of the network: image requests in, crops out, in order, in worker processes.

Workers import no torch, hold no file handles of the store, and end when their parent does, even
if it was killed. What waits in the queue is bounded by a number of crops, so memory does not grow
with the data.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from dragn_cache.errors import DragnCacheError, ImageError
from dragn_cache.images import Crops, ImageRequest, read_crops

Decoded = Crops | ImageError


def decode(
    requests: Iterable[ImageRequest], *, workers: int, ahead_crops: int
) -> Generator[tuple[ImageRequest, Decoded], None, None]:
    """Decode requests in order.

    Args:
        requests: taken lazily.
        workers: processes; 0 decodes here.
        ahead_crops: how many crops may be decoded or under way beyond the one given out.

    Yields:
        each request with its crops, or with the error that makes its image unusable.
    """
    if workers == 0:
        for request in requests:
            yield request, _attempt(request)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dragn_cache.decode"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    waiting: deque[tuple[ImageRequest, Future[Decoded]]] = deque()
    ahead = 0
    try:
        for request in requests:
            waiting.append((request, pool.submit(_attempt, request)))
            ahead += len(request.boxes)
            while ahead > ahead_crops and len(waiting) > workers:
                ahead -= len(waiting[0][0].boxes)
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool as error:
        raise DragnCacheError(
            "decoding",
            expected="worker processes that live",
            got="one that died (out of memory?)",
            remedy="run the same command again, with fewer --workers if it repeats",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _next(waiting: deque[tuple[ImageRequest, Future[Decoded]]]) -> tuple[ImageRequest, Decoded]:
    request, future = waiting.popleft()
    return request, future.result()


def _attempt(request: ImageRequest) -> Decoded:
    try:
        return read_crops(request)
    except ImageError as error:
        return error


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
