"""What this machine has for extracting, and what an extraction of a data set here would cost.

Nothing is written. The cost is measured on a few of the data set's own images for a few seconds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from dragn_cache.compute import Forward, can_compile, choose_compute
from dragn_cache.config import ExtractConfig, usable_cores
from dragn_cache.decode import attempt
from dragn_cache.engine import Wanted
from dragn_cache.errors import ImageError, InputError
from dragn_cache.extract import describe, open_backbone, plan_images, with_channels
from dragn_cache.manifest import Manifest
from dragn_cache.native import find_compiler
from dragn_cache.report import Phase, advice_for
from dragn_cache.store import instances_of, plan_parts

NEEDED = ("torch", "torchvision", "numpy", "h5py", "zarr", "pillow", "tifffile", "imagecodecs")
EXTRAS = ("anndata",)
SECONDS = 2.5  # spent on each of decoding and the network


@dataclass(frozen=True)
class Finding:
    """One line of the examination; ``remedy`` is empty where all is well."""

    what: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Cost:
    """What an extraction here would take.

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


def examine(out: Path) -> list[Finding]:
    """Python, packages, devices, compiler, disk and weights cache."""
    found = [
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("processor", f"{usable_cores()} cores, {_memory()} of memory"),
    ]
    for name in NEEDED:
        found.append(_package(name, f"pip install {name}"))
    for name in EXTRAS:
        found.append(_package(name, f'pip install "dragn-cache[{name}]" to use it'))
    found.append(Finding("HDF5", h5py.version.hdf5_version))
    found.append(_cuda())
    compiler = find_compiler()
    remedy = "" if compiler else "apt install g++: large extractions and DRAGN are faster"
    found.append(Finding("C++ compiler", compiler or "none", remedy))
    found.append(_disk(out))
    found.append(_weights())
    return found


def _package(name: str, remedy: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", remedy)


def _memory() -> str:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return f"{pages * size / 1e9:.1f} GB"


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return Finding("GPU", f"none that torch can use (built for {built or 'the CPU only'})")
    devices = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    names = ", ".join(
        f"cuda:{k} {d.name} {d.total_memory / 1e9:.0f} GB" for k, d in enumerate(devices)
    )
    remedy = (
        "" if can_compile("cuda") else "install Triton and a C++ compiler, to have jobs compiled"
    )
    return Finding("GPU", names, remedy)


def _disk(out: Path) -> Finding:
    folder = _existing(out)
    usage = shutil.disk_usage(folder)
    writable = os.access(folder, os.W_OK)
    remedy = "" if writable else "choose another folder, or correct its rights"
    text = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB at {folder}"
    return Finding("disk", text if writable else f"{text}, not writable", remedy)


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def _weights() -> Finding:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    files = [p for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
    size = sum(p.stat().st_size for p in files)
    return Finding("weights", f"{len(files)} files, {size / 1e6:.0f} MB in {folder}")


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
    backbone = open_backbone(config)
    sizes = [len(instances_of(manifest, bag)) for bag in range(len(manifest.bags))]
    instances, views = sum(sizes), 1 + config.views
    compute: str = config.compute
    if compute == "auto":
        compute = choose_compute(backbone, instances * views, config.batch_size)
    description = describe(manifest, config, backbone, compute)
    images = [
        wanted
        for part in plan_parts(sizes, description.row_bytes, config.part_instances)
        for wanted in plan_images(manifest, part, backbone, config.augmentation)
    ]
    precision = description.provenance["numerics"]["autocast"] or "float32"
    forward = Forward(
        backbone,
        compute=compute,
        batch_size=config.batch_size,
        dtype=config.dtype,
        precision=precision,
    )
    if compute == "compiled":
        say("compiling the network, as the extraction would")
    forward.warm_up()
    start_s = time.perf_counter() - started
    decode_s, unreadable = _decode_seconds(images)
    forward_s = views * _forward_seconds(forward)
    decoding = decode_s * len(images) / max(1, instances) / min(config.workers or 1, usable_cores())
    on_gpu = forward.device.type == "cuda"
    each = max(decoding, forward_s) if on_gpu else decoding + forward_s
    limit: Phase = "decoding" if decoding > forward_s else "network"
    return Cost(
        images=len(images),
        instances=instances,
        bytes=instances * description.row_bytes,
        decode_ms=1000 * decode_s,
        forward_ms=1000 * forward_s,
        start_s=start_s,
        rate=1 / each,
        seconds=start_s + instances * each,
        limit=limit,
        advice=advice_for(
            limit,
            device=config.device,
            workers=config.workers,
            cores=usable_cores(),
            decode_ms=1000 * decode_s,
            batch_size=config.batch_size,
        ),
        compute=compute,
        device=config.device,
        workers=config.workers,
        unreadable=unreadable,
        free_bytes=shutil.disk_usage(_existing(out)).free,
    )


def _decode_seconds(images: Sequence[Wanted]) -> tuple[float, int]:
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
        pending = [forward(batch) for _ in range(2)]
        for each in pending:
            each.arrays()
        seconds.append((time.perf_counter() - started) / (2 * forward.batch_size))
    return float(np.median(seconds))
