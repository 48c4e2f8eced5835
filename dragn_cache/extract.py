"""Stage one: every crop of every bag once through a frozen backbone, into a store.

Work goes part by part; images are decoded ahead by worker processes, an image with several boxes
once; batches are filled across bags but never across parts, so that a part's bytes depend on the
plan alone and a killed run resumes by writing the parts that are missing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from dragn_cache.backbones import Backbone, load_backbone
from dragn_cache.config import ExtractConfig
from dragn_cache.decode import Decoded, decode
from dragn_cache.errors import DragnCacheError, ImageError, InputError, StoreError
from dragn_cache.images import COLOURS, Geometry, ImageRequest, plan_channels
from dragn_cache.intensity import Intensity
from dragn_cache.manifest import Instance, Manifest
from dragn_cache.store import (
    Failure,
    InstanceRecord,
    PartPlan,
    PartWriter,
    StoreDescription,
    StoreWriter,
    Tap,
    json_digest,
    open_writer,
    plan_parts,
)
from dragn_cache.store.plan import PART_BYTES

PREPROCESSING_KEYS = ("size", "mean", "std", "interpolation", "channels", "rgb", "intensity")

Progress = Callable[[int, int], None]
"""Called with instances done (those in finished parts included) and instances in total."""


@dataclass
class ExtractReport:
    """What an extraction did and where its time went.

    Attributes:
        instances_done: rows written by this call; ``instances_total`` those of the manifest.
        images_decoded: image requests decoded by this call.
        parts_written, parts_total: parts written by this call, and planned.
        decode_seconds: summed over workers; ``wait_seconds``: the main process waiting for them.
        forward_seconds: the network; ``write_seconds``: scratch, digests and parts.
        start_seconds: reading the weights and planning.
        failures: every input not used, in the whole store.
    """

    instances_total: int = 0
    instances_done: int = 0
    images_decoded: int = 0
    parts_total: int = 0
    parts_written: int = 0
    decode_seconds: float = 0.0
    wait_seconds: float = 0.0
    forward_seconds: float = 0.0
    write_seconds: float = 0.0
    start_seconds: float = 0.0
    total_seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def extract(
    manifest: Manifest, config: ExtractConfig, out: Path, *, progress: Progress | None = None
) -> ExtractReport:
    """Run a frozen backbone over all instances of a manifest and store its taps.

    The same call goes on after a kill and does nothing when the store is complete.

    Raises:
        InputError, ImageError: an input cannot be used and ``on_error`` is ``stop``.
        StoreMismatchError: there is a store of other settings at ``out``.
        StoreError: the disk is full or cannot be written. What was complete stays.
    """
    started = time.perf_counter()
    config = config.with_defaults(manifest.extract)
    _require_image_root(manifest)
    if config.on_error == "stop":
        _refuse_empty_bags(manifest)
    if config.rgb is None:
        config = replace(config, rgb=_default_rgb(manifest, config.channels or "rgb"))
    backbone = open_backbone(config)
    sizes = [len(manifest.instances.get(bag.bag_id, ())) for bag in manifest.bags]
    row_bytes = sum(tap.row_bytes for tap in _taps(backbone, config))
    parts = plan_parts(sizes, row_bytes, config.part_instances)
    description = describe(manifest, config, backbone)
    requests = {part.number: _requests(manifest, part, backbone) for part in parts}
    try:
        writer = open_writer(out, description, parts, manifest)
        run = _Run(manifest, config, backbone, writer, progress)
        run.report.instances_total, run.report.parts_total = sum(sizes), len(parts)
        run.report.start_seconds = time.perf_counter() - started
        run.write_parts(writer.missing(), requests, sizes)
        run.report.failures = writer.write_failures()
    except OSError as error:
        raise _disk_error(out, error) from error
    run.report.total_seconds = time.perf_counter() - started
    return run.report


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


def describe(manifest: Manifest, config: ExtractConfig, backbone: Backbone) -> StoreDescription:
    """What the store will say about itself: taps, and the provenance behind its three digests."""
    plan = [
        [bag.bag_id, [[row.image, row.order, row.box] for row in _rows(manifest, bag.bag_id)]]
        for bag in manifest.bags
    ]
    return StoreDescription(
        format=config.format,
        taps=_taps(backbone, config),
        provenance={
            "features": {**backbone.provenance(), "augmentation": None},
            "numerics": {
                "dtype": config.dtype,
                "device": torch.device(config.device).type,
                "autocast": None,
                "compute": "eager",
                "memory_format": "channels_last",
                "batch_size": config.batch_size,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "pillow": PIL.__version__,
            },
            "plan": {
                "manifest_sha256": json_digest(plan),
                "channels": list(manifest.channels),
                "bags": len(manifest.bags),
                "instances": manifest.n_instances,
                "part_instances": config.part_instances,
                "part_bytes": PART_BYTES,
            },
        },
    )


def batch_sizes(count: int, batch: int) -> list[int]:
    """Sizes of the forward passes for ``count`` instances: full batches, then the smallest of
    b, b/2, b/4, b/8 that holds the rest (filled up by repetition)."""
    full, rest = divmod(count, batch)
    sizes = [batch] * full
    if rest:
        sizes.append(min(s for k in (1, 2, 4, 8) if (s := max(1, batch // k)) >= rest))
    return sizes


class _Run:
    """One extraction under way: the batch being filled, the timers, the report."""

    def __init__(
        self,
        manifest: Manifest,
        config: ExtractConfig,
        backbone: Backbone,
        writer: StoreWriter,
        progress: Progress | None,
    ) -> None:
        self.manifest, self.config, self.backbone, self.writer = manifest, config, backbone, writer
        self.progress = progress or (lambda done, total: None)
        self.report = ExtractReport()
        self._pixels: list[np.ndarray[Any, Any]] = []
        self._rows: list[int] = []
        self._records: list[InstanceRecord] = []

    def write_parts(
        self,
        missing: Sequence[PartPlan],
        requests: dict[int, _PartRequests],
        sizes: Sequence[int],
    ) -> None:
        todo = sum(requests[part.number].rows for part in missing)
        self._done = self.report.instances_total - todo
        self.progress(self._done, self.report.instances_total)
        stream = decode(
            (request for part in missing for request in requests[part.number].requests),
            workers=self.config.workers if todo else 0,
            ahead_crops=2 * self.config.batch_size,
        )
        with closing(stream):
            for part in missing:
                ids = [bag.bag_id for bag in self.manifest.bags[part.first_bag : part.last_bag]]
                with self.writer.part(part, ids, sizes[part.first_bag : part.last_bag]) as target:
                    self._fill(target, requests[part.number], ids, stream)
                    started = time.perf_counter()
                self.report.write_seconds += time.perf_counter() - started
                self.report.parts_written += 1

    def _fill(
        self,
        target: PartWriter,
        wanted: _PartRequests,
        ids: Sequence[str],
        stream: Iterator[tuple[ImageRequest, Decoded]],
    ) -> None:
        for bag_id in ids:
            if not _rows(self.manifest, bag_id):
                target.fail_bag(Failure(bag_id, "", "", "the manifest has no image for this bag"))
        for instances in wanted.instances:
            started = time.perf_counter()
            request, decoded = next(stream)
            self.report.wait_seconds += time.perf_counter() - started
            self.report.images_decoded += 1
            self._take(target, request, decoded, instances)
            while len(self._rows) >= self.config.batch_size:
                self._forward(target, self.config.batch_size)
        for size in batch_sizes(len(self._rows), self.config.batch_size):
            self._forward(target, size)

    def _take(
        self,
        target: PartWriter,
        request: ImageRequest,
        decoded: Decoded,
        instances: Sequence[tuple[int, Instance]],
    ) -> None:
        if isinstance(decoded, ImageError):
            for row, instance in instances:
                self._fail(target, row, instance, decoded)
            return
        self.report.decode_seconds += decoded.seconds
        crops = iter(decoded.pixels)
        for (row, instance), box in zip(instances, decoded.boxes, strict=True):
            if isinstance(box, str):
                error = ImageError(
                    f"{instance.file}:{instance.line} ({instance.image})",
                    expected="a box inside the image",
                    got=box,
                    remedy="correct the box",
                )
                self._fail(target, row, instance, error)
                continue
            self._pixels.append(next(crops))
            self._rows.append(row)
            record = InstanceRecord(instance.image, box, instance.order, decoded.digest)
            self._records.append(record)

    def _fail(self, target: PartWriter, row: int, instance: Instance, error: ImageError) -> None:
        if self.config.on_error == "stop":
            raise ImageError(
                f"bag {instance.bag_id!r}, {error.where}",
                expected=error.expected,
                got=error.got,
                remedy=f"{error.remedy}, or extract with --on-error skip",
            )
        box = ",".join(map(str, instance.box)) if instance.box else ""
        target.fail(row, Failure(instance.bag_id, instance.image, box, str(error)))
        self._advance(1)

    def _forward(self, target: PartWriter, size: int) -> None:
        """Run one batch of a fixed size, filled up by repeating its last instance."""
        count = min(size, len(self._rows))
        started = time.perf_counter()
        batch = np.stack(self._pixels[:count] + self._pixels[count - 1 : count] * (size - count))
        outputs = self.backbone(torch.from_numpy(batch).to(self.config.device))
        rows, records = self._rows[:count], self._records[:count]
        values = {}
        for name, output in outputs.items():
            exact = output[:count]
            stored = exact.to(getattr(torch, self.config.dtype))
            if not torch.isfinite(stored).all():
                self._refuse_values(target, name, exact, stored, rows)
            values[name] = stored.cpu().numpy()
        forwarded = time.perf_counter()
        target.put(rows, records, values)
        self.report.forward_seconds += forwarded - started
        self.report.write_seconds += time.perf_counter() - forwarded
        del self._pixels[:count], self._rows[:count], self._records[:count]
        self.report.instances_done += count
        self._advance(count)

    def _refuse_values(
        self,
        target: PartWriter,
        tap: str,
        exact: torch.Tensor,
        stored: torch.Tensor,
        rows: Sequence[int],
    ) -> None:
        bad = ~torch.isfinite(stored)
        first = int(bad.flatten(1).any(1).nonzero()[0, 0])
        value = exact[first][bad[first]][0].item()
        bag = target.bags[int(np.searchsorted(np.cumsum(target.sizes), rows[first], "right"))]
        limit = torch.finfo(stored.dtype).max
        too_large = np.isfinite(value)
        raise DragnCacheError(
            f"bag {bag!r}, tap {tap!r}",
            expected=f"finite values up to {limit:g} ({self.config.dtype})",
            got=f"{value:g}",
            remedy="use --dtype float32" if too_large else "check the weights and --mean, --std",
        )

    def _advance(self, count: int) -> None:
        self._done += count
        self.progress(self._done, self.report.instances_total)


@dataclass(frozen=True)
class _PartRequests:
    """A part's images in order of first appearance, and which rows each one feeds."""

    requests: tuple[ImageRequest, ...]
    instances: tuple[tuple[tuple[int, Instance], ...], ...]

    @property
    def rows(self) -> int:
        return sum(len(group) for group in self.instances)


def _requests(manifest: Manifest, part: PartPlan, backbone: Backbone) -> _PartRequests:
    by_image: dict[str, list[tuple[int, Instance]]] = {}
    row = 0
    for bag in manifest.bags[part.first_bag : part.last_bag]:
        for instance in _rows(manifest, bag.bag_id):
            by_image.setdefault(instance.image, []).append((row, instance))
            row += 1
    settings = backbone.preprocessing
    geometry = Geometry(settings.size, settings.resize_shorter, settings.interpolation)
    intensity = Intensity.parse(settings.intensity)
    requests = []
    for image, group in by_image.items():
        names, planes = plan_channels(image, manifest.channels, settings.rgb, settings.channels)
        files = image_files(manifest, image, names)
        boxes = tuple(instance.box for _, instance in group)
        requests.append(
            ImageRequest(image, files, planes, boxes, geometry, intensity, len(manifest.channels))
        )
    return _PartRequests(tuple(requests), tuple(tuple(group) for group in by_image.values()))


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
