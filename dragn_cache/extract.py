"""Stage one: every crop of every bag once through a frozen backbone, into a store.

Work goes part by part, and a part that exists is complete: a killed run resumes by writing the
parts that are missing, and several processes share a store by claiming parts. How features are
computed is decided once, for the whole plan, and is part of the store's *numerics*. The engine that
decodes, computes and writes is in `dragn_cache.engine`.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision

from dragn_cache.augment import Augmentation
from dragn_cache.backbones import Backbone, load_backbone
from dragn_cache.compute import Forward, choose_compute, require_compute
from dragn_cache.config import ExtractConfig, usable_cores
from dragn_cache.decode import Decoder
from dragn_cache.devices import find_device
from dragn_cache.engine import Engine, Policy, Wanted
from dragn_cache.errors import DragnCacheError, InputError, StoreError
from dragn_cache.images import COLOURS, Geometry, ImageRequest, plan_channels
from dragn_cache.intensity import Intensity
from dragn_cache.manifest import Instance, Manifest
from dragn_cache.processes import follow_parent
from dragn_cache.report import ExtractReport
from dragn_cache.store import (
    PartPlan,
    StoreDescription,
    StoreWriter,
    Tap,
    instances_of,
    manifest_digest,
    open_writer,
    plan_parts,
    read_description,
)
from dragn_cache.store.plan import PART_BYTES
from dragn_cache.store.schema import CLEAN_VIEW
from dragn_cache.update import update_plan

PREPROCESSING_KEYS = ("size", "mean", "std", "interpolation", "channels", "rgb", "intensity")

Progress = Callable[[int, int], None]
"""Called with instances done (those in finished parts included) and instances in total."""
Say = Callable[[str], None]
"""Called with a line for people about something that takes a while."""

POLL_SECONDS = (0.02, 1.0)  # between looks at parts that other processes work on: first, longest


def extract(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    *,
    update: bool = False,
    progress: Progress | None = None,
    say: Say = lambda text: None,
) -> ExtractReport:
    """Run a frozen backbone over all instances of a manifest and store its taps.

    The same call goes on after a kill, shares the work with other processes that make it at the
    same time, and does nothing when the store is complete.

    Args:
        update: bring a store that was made from an earlier state of the manifest and its images
            up to date: bags that are new or have changed are computed, removed ones dropped.

    Raises:
        InputError, ImageError: an input cannot be used and ``on_error`` is ``stop``.
        StoreMismatchError: there is a store of other settings at ``out``.
        StoreError: the disk is full or cannot be written. What was complete stays.
        DragnCacheError: a decoding process or a device's process died, or a value overflowed.
    """
    started = time.perf_counter()
    config = config.with_defaults(manifest.extract)
    _require_image_root(manifest)
    if config.on_error == "stop":
        _refuse_empty_bags(manifest)
    config = with_channels(manifest, config)
    try:
        if len(config.devices) > 1:
            report = _extract_on_devices(manifest, config, out, update, progress, say)
        else:
            report = _extract_here(manifest, config, out, update, progress, say)
    except OSError as error:
        raise _disk_error(out, error) from error
    report.total_seconds = time.perf_counter() - started
    return report


def _extract_here(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    update: bool,
    progress: Progress | None,
    say: Say,
) -> ExtractReport:
    started = time.perf_counter()
    backbone = open_backbone(config)
    sizes = [len(instances_of(manifest, bag)) for bag in range(len(manifest.bags))]
    compute = _decide_compute(out, config, backbone, sum(sizes))
    description = describe(manifest, config, backbone, compute)
    parts = plan_parts(sizes, description.row_bytes, config.part_instances)

    def wanted(part: PartPlan) -> list[Wanted]:
        return plan_images(manifest, part, backbone, config.augmentation)

    _check_channels(manifest, backbone)
    report = ExtractReport(compute=compute, device=config.device, workers=config.workers)
    report.cores, report.batch_size = usable_cores(), config.batch_size
    if update and (out / "store.json").exists():
        report.update = update_plan(out, description, manifest, wanted, config)
    with (
        open_writer(out, description, parts, manifest) as writer,
        Decoder(
            workers=config.workers,
            ahead_crops=2 * config.batch_size,
            give_way=backbone.mean.device.type == "cpu",
        ) as decoder,
    ):
        report.instances_total, report.parts_total = sum(sizes), len(writer.parts)
        report.bags_total = len(manifest.bags)
        if writer.missing():
            decoder.start()
            run = _Run(writer, sizes, progress)
            forward = _open_forward(backbone, config, compute, say)
            policy = Policy(config.on_error, config.max_errors)
            engine = Engine(wanted, forward, writer, decoder, policy, report, run.advance)
            engine.failed = len(writer.failures()) if config.max_errors is not None else 0
            report.start_seconds = time.perf_counter() - started
            run.until_complete(engine)
        report.failures = writer.finish()
    return report


class _Run:
    """Passes over the missing parts until there are none, with the progress of all processes."""

    def __init__(
        self, writer: StoreWriter, sizes: Sequence[int], progress: Progress | None
    ) -> None:
        self.writer, self.sizes, self.total = writer, sizes, sum(sizes)
        self.progress = progress or (lambda done, total: None)
        self._done = 0

    def until_complete(self, engine: Engine) -> None:
        pause, longest = POLL_SECONDS
        while missing := self.writer.missing():
            todo = sum(self.sizes[bag] for part in missing for bag in part.bags)
            self._done = self.total - todo
            self.progress(self._done, self.total)
            if engine.write(self.writer.claim_missing()):
                pause = POLL_SECONDS[0]
            else:  # others work on what is left: wait until it is there, or they are dead
                time.sleep(pause)
                pause = min(2 * pause, longest)
        self.progress(self.total, self.total)

    def advance(self, count: int) -> None:
        self._done += count
        self.progress(self._done, self.total)


def _decide_compute(out: Path, config: ExtractConfig, backbone: Backbone, images: int) -> str:
    """As asked for; else as the store there was begun; else what the whole plan pays for."""
    device = backbone.mean.device.type
    compute: str = config.compute
    if compute == "auto" and (out / "store.json").exists():
        have = read_description(out).provenance["numerics"].get("compute")
        compute = have if have in ("eager", "compiled") else "auto"
    if compute == "auto":
        compute = choose_compute(backbone, images * (1 + config.views), config.batch_size)
    require_compute(compute, device)
    return compute


def _open_forward(backbone: Backbone, config: ExtractConfig, compute: str, say: Say) -> Forward:
    forward = Forward(
        backbone,
        compute=compute,
        batch_size=config.batch_size,
        dtype=config.dtype,
        precision=_precision(config),
    )
    if compute == "compiled":
        say("compiling the network (half a minute; less the next time)")
    forward.warm_up()
    return forward


def _precision(config: ExtractConfig) -> str:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if torch.device(config.device).type == "cuda" else "float32"


# --- several devices -----------------------------------------------------------------------------


def _extract_on_devices(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    update: bool,
    progress: Progress | None,
    say: Say,
) -> ExtractReport:
    """One process for each device, all on one store."""
    for device in config.devices:
        find_device(device)
    if update and (out / "store.json").exists():  # the plan is changed once, by this process
        backbone = open_backbone(replace(config, device="cpu"))
        first = replace(config, device=config.devices[0])
        sizes = [len(instances_of(manifest, bag)) for bag in range(len(manifest.bags))]
        compute = _decide_compute(out, first, backbone, sum(sizes))
        description = describe(manifest, first, backbone, compute)
        changes = update_plan(
            out,
            description,
            manifest,
            lambda part: plan_images(manifest, part, backbone, config.augmentation),
            config,
        )
    else:
        changes = None
    context = multiprocessing.get_context("spawn")
    each = max(1, config.workers // len(config.devices)) if config.workers else 0
    children = {}
    for device in config.devices:
        ours, theirs = context.Pipe(duplex=False)
        own = replace(config, device=device, workers=each)
        child = context.Process(target=_on_device, args=(manifest, own, out, theirs))
        child.start()
        theirs.close()
        children[ours] = child
    try:
        reports = _follow(children, progress, say)
    finally:
        for child in children.values():
            child.terminate()
            child.join()
    report = reports[0]
    for other in reports[1:]:
        report.add(other)
    report.device, report.workers, report.update = config.device, config.workers, changes
    report.failures = max((r.failures for r in reports), key=len)
    return report


def _on_device(manifest: Manifest, config: ExtractConfig, out: Path, parent: Connection) -> None:
    """One device's process: sends instances done, lines for people, and its report or its error."""
    follow_parent()

    def count(done: int, total: int) -> None:
        parent.send((done, total))

    try:
        parent.send(extract(manifest, config, out, progress=count, say=parent.send))
    except DragnCacheError as error:
        parent.send(error)
    except KeyboardInterrupt:
        os._exit(130)


def _follow(children: dict[Any, Any], progress: Progress | None, say: Say) -> list[ExtractReport]:
    """Relay what the children send until all have ended.

    A child that dies leaves its parts to the others; only when none is left is it an error.
    """
    reports: list[ExtractReport] = []
    open_ends: list[Any] = list(children)
    firsts: dict[Any, int] = {}
    latest: dict[Any, int] = {}
    said: set[str] = set()
    while open_ends:
        for end in list[Any](wait_for(open_ends)):
            try:
                message = end.recv()
            except EOFError:
                open_ends.remove(end)
                continue
            if isinstance(message, DragnCacheError):
                raise message
            if isinstance(message, ExtractReport):
                reports.append(message)
            elif isinstance(message, str) and message not in said:
                said.add(message)
                say(message)
            elif isinstance(message, tuple):
                firsts.setdefault(end, message[0])
                latest[end] = message[0]
                if progress is not None:
                    grown = sum(latest[e] - firsts[e] for e in latest)
                    progress(min(min(firsts.values()) + grown, message[1]), message[1])
    if not reports:
        raise DragnCacheError(
            "extraction",
            expected="a process for each device that lives",
            got="none that lived to the end (out of memory?)",
            remedy="run the same command again, with a smaller --batch-size if it repeats",
        )
    return reports


# --- the plan ------------------------------------------------------------------------------------


def with_channels(manifest: Manifest, config: ExtractConfig) -> ExtractConfig:
    """The settings with the channels named, so that provenance can name them."""
    if config.rgb is not None:
        return config
    return replace(config, rgb=_default_rgb(manifest, config.channels or "rgb"))


def open_backbone(config: ExtractConfig) -> Backbone:
    """Load the backbone that a (filled) config asks for."""
    return load_backbone(
        config.backbone or "resnet50",
        weights=config.weights,
        taps=config.taps,
        grid=config.grid,
        device=config.device,
        preprocessing={
            key: value for key in PREPROCESSING_KEYS if (value := getattr(config, key)) is not None
        },
    )


def describe(
    manifest: Manifest, config: ExtractConfig, backbone: Backbone, compute: str
) -> StoreDescription:
    """What the store will say about itself: taps, and the provenance behind its three digests."""
    precision = _precision(config)
    return StoreDescription(
        format=config.format,
        taps=_taps(backbone, config),
        provenance={
            "features": {
                **backbone.provenance(),
                "augmentation": config.augmentation and config.augmentation.to_dict(),
            },
            "numerics": {
                "dtype": config.dtype,
                "device": torch.device(config.device).type,
                "autocast": None if precision == "float32" else precision,
                "compute": compute,
                "memory_format": "channels_last",
                "batch_size": config.batch_size,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "pillow": PIL.__version__,
                **{name: _version(name) for name in ("tifffile", "imagecodecs")},
                # numpy's random distributions may change between versions.
                "numpy": _version("numpy") if config.augmentation else None,
            },
            "plan": {
                "manifest_sha256": manifest_digest(manifest),
                "channels": list(manifest.channels),
                "bags": len(manifest.bags),
                "instances": manifest.n_instances,
                "part_instances": config.part_instances,
                "part_bytes": PART_BYTES,
            },
        },
        views=config.augmentation.view_names if config.augmentation else (CLEAN_VIEW,),
        made_from={"dataset": manifest.name, "weights": Path(config.weights).name},
    )


def plan_images(
    manifest: Manifest, part: PartPlan, backbone: Backbone, augmentation: Augmentation | None
) -> list[Wanted]:
    """A part's images in order of first appearance, and which rows each one feeds."""
    by_image: dict[str, list[tuple[int, Instance]]] = {}
    row = 0
    for bag in part.bags:
        for instance in instances_of(manifest, bag):
            by_image.setdefault(instance.image, []).append((row, instance))
            row += 1
    settings = backbone.preprocessing
    geometry = Geometry(settings.size, settings.resize_shorter, settings.interpolation)
    intensity = Intensity.parse(settings.intensity)
    found = []
    for image, group in by_image.items():
        names, planes = plan_channels(image, manifest.channels, settings.rgb, settings.channels)
        files = image_files(manifest, image, names)
        boxes = tuple(instance.box for _, instance in group)
        request = ImageRequest(
            image,
            files,
            planes,
            boxes,
            geometry,
            intensity,
            len(manifest.channels),
            augmentation,
            tuple(instance.bag_id for _, instance in group),
        )
        found.append(Wanted(request, tuple(group)))
    return found


def _check_channels(manifest: Manifest, backbone: Backbone) -> None:
    """Raise InputError if the channels asked for are not there, before anything is written."""
    settings = backbone.preprocessing
    split = {
        "{channel}" in row.image: row.image for rows in manifest.instances.values() for row in rows
    }
    for image in split.values():
        plan_channels(image, manifest.channels, settings.rgb, settings.channels)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def image_files(manifest: Manifest, image: str, channels: Sequence[str] | None) -> tuple[Path, ...]:
    """The files behind an image path: itself, or one for each of the named channels."""
    if channels is None:
        return (manifest.image_root / image,)
    return tuple(manifest.image_root / image.replace("{channel}", name) for name in channels)


def _rows(manifest: Manifest, bag_id: str) -> tuple[Instance, ...]:
    return manifest.instances.get(bag_id, ())


def _taps(backbone: Backbone, config: ExtractConfig) -> tuple[Tap, ...]:
    return tuple(Tap(name, shape, config.dtype) for name, shape in backbone.tap_shapes.items())


def _require_image_root(manifest: Manifest) -> None:
    if not manifest.image_root.is_dir():
        raise InputError(
            f"image root {manifest.image_root}",
            expected="a folder",
            got="none",
            remedy="correct images in dataset.toml, or give --images DIR",
        )


def _default_rgb(manifest: Manifest, mode: str) -> tuple[str, ...] | None:
    """The channels that feed the inputs when none are named, so that provenance can name them."""
    if mode != "rgb":
        return manifest.channels or COLOURS
    for rows in manifest.instances.values():
        for row in rows:
            names, _ = plan_channels(row.image, manifest.channels, None)
            if names is not None:
                return names
    return None


def _refuse_empty_bags(manifest: Manifest) -> None:
    for bag in manifest.bags:
        if not _rows(manifest, bag.bag_id):
            raise InputError(
                f"{bag.file}:{bag.line}",
                expected="at least one image",
                got=f"none for bag {bag.bag_id!r}",
                remedy="add its images, remove the bag, or extract with --on-error skip",
            )


def _disk_error(out: Path, error: OSError) -> StoreError:
    # HDF5 buries the system's own words in a long line of its own.
    buried = re.search(r"error message = '([^']+)'", str(error))
    return StoreError(
        str(out),
        expected="a folder that can be written",
        got=buried[1] if buried else error.strerror or str(error),
        remedy="free space or correct the rights, then run the same command again; "
        "finished parts are kept",
    )
