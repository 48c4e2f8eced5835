"""Estimate of the time and space that an extraction takes on this machine.

Nothing is written. Decoding and the network are measured for a few seconds on a few of the data
set's own images.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dragn_cache.errors import ImageError, InputError
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.forward import Forward
from dragn_cache.extraction.plan import PlannedImage, plan_extraction, with_channels
from dragn_cache.extraction.report import Phase, advice_for
from dragn_cache.extraction.workers import attempt
from dragn_cache.machine import usable_cores
from dragn_cache.manifest import Manifest

SECONDS = 2.5  # spent on each of decoding and the network


@dataclass(frozen=True)
class Cost:
    """Time and space of an extraction on this machine.

    Attributes:
        images, instances: of the data set; ``bytes``: of the store.
        decode_ms: an image on one core; ``forward_ms``: an instance, all its views.
        start_s: reading the weights and, if compiled, compiling, as it took here.
        rate: instances a second; ``seconds``: the whole.
        limit: ``decoding`` or ``network``; ``advice``: what would help.
        free_bytes: on the disk of the store.
    """

    images: int
    instances: int
    bytes: int
    decode_ms: float
    forward_ms: float
    start_s: float
    rate: float
    seconds: float
    limit: str
    advice: str
    compute: str
    device: str
    workers: int
    unreadable: int
    free_bytes: int


def existing_folder(path: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def estimate(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Cost:
    """Measure decoding and the network on a few images, and work out the whole.

    Raises:
        InputError: no image can be read; a setting cannot be used.
    """
    config = with_channels(manifest, config.with_defaults(manifest.extract))
    started = time.perf_counter()
    plan = plan_extraction(manifest, config, None)
    images = [image for part in plan.parts for image in plan.images_of(part)]
    forward = plan.create_forward()
    if plan.compute == "compiled":
        say("compiling the network, as the extraction would")
    forward.warm_up()
    start_s = time.perf_counter() - started
    decode_s, unreadable = _decode_seconds(images)
    forward_s = len(plan.description.views) * _forward_seconds(forward)
    decode_ms = 1000 * decode_s
    cores = min(config.workers or 1, usable_cores())
    decoding_s = decode_s * len(images) / max(1, plan.instances) / cores  # of an instance
    # Beside a GPU the two go on together, on the CPU one after the other.
    on_gpu = forward.device.type == "cuda"
    instance_s = max(decoding_s, forward_s) if on_gpu else decoding_s + forward_s
    limit: Phase = "decoding" if decoding_s > forward_s else "network"
    return Cost(
        images=len(images),
        instances=plan.instances,
        bytes=plan.instances * plan.description.row_bytes,
        decode_ms=decode_ms,
        forward_ms=1000 * forward_s,
        start_s=start_s,
        rate=1 / instance_s,
        seconds=start_s + plan.instances * instance_s,
        limit=limit,
        advice=advice_for(
            limit,
            device=config.device,
            workers=config.workers,
            cores=usable_cores(),
            decode_ms=decode_ms,
            batch_size=config.batch_size,
        ),
        compute=plan.compute,
        device=config.device,
        workers=config.workers,
        unreadable=unreadable,
        free_bytes=shutil.disk_usage(existing_folder(out)).free,
    )


def _decode_seconds(images: Sequence[PlannedImage]) -> tuple[float, int]:
    """Seconds an image on one core, over images spread across the data set; and how many failed."""
    order = np.random.default_rng(0).permutation(len(images))
    seconds: list[float] = []
    unreadable = 0
    deadline = time.perf_counter() + SECONDS
    for k in order.tolist():
        result = attempt(images[k].request)
        if isinstance(result, ImageError):
            unreadable += 1
        else:
            seconds.append(result.seconds)
        if time.perf_counter() > deadline:
            break
    if not seconds:
        raise InputError(
            "the data set",
            expected="images that can be read",
            got=f"none among {unreadable}",
            remedy="run dragn-cache check",
        )
    return float(np.mean(seconds)), unreadable


def _forward_seconds(forward: Forward) -> float:
    """Seconds an instance and view, on full batches."""
    shape: tuple[Any, ...] = (forward.batch_size, *forward.backbone.input_shape)
    batch = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    seconds: list[float] = []
    deadline = time.perf_counter() + SECONDS
    while len(seconds) < 3 or time.perf_counter() < deadline:
        started = time.perf_counter()
        results = [forward(batch) for _ in range(2)]
        for result in results:
            result.arrays()
        seconds.append((time.perf_counter() - started) / (2 * forward.batch_size))
    return float(np.median(seconds))
