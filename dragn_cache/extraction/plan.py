"""Plan of an extraction: taps, preprocessing, precision and parts, decided before any work."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
import torchvision

from dragn_cache.backbone_input import BackboneInput, Intensity
from dragn_cache.backbones import Backbone, load_backbone
from dragn_cache.errors import InputError
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.forward import choose_compute, require_compute
from dragn_cache.images.augment import Augmentation
from dragn_cache.images.channels import COLOURS, plan_channels
from dragn_cache.images.crops import Geometry, ImageRequest
from dragn_cache.manifest import Instance, Manifest
from dragn_cache.options import declarations
from dragn_cache.store import (
    PartPlan,
    StoreDescription,
    Tap,
    instances_of,
    manifest_digest,
    read_description,
)
from dragn_cache.store.plan import PART_BYTES
from dragn_cache.types import CLEAN_VIEW


@dataclass(frozen=True)
class Wanted:
    """One image to decode, and the rows of its part that its crops become."""

    request: ImageRequest
    instances: tuple[tuple[int, Instance], ...]


def decide_compute(out: Path, config: ExtractConfig, backbone: Backbone, images: int) -> str:
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


def choose_precision(config: ExtractConfig) -> str:
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if torch.device(config.device).type == "cuda" else "float32"


# --- the plan ------------------------------------------------------------------------------------


def with_channels(manifest: Manifest, config: ExtractConfig) -> ExtractConfig:
    """The settings with the channels named, so that provenance can name them."""
    if config.rgb is not None:
        return config
    return config.replace(rgb=_default_rgb(manifest, config.channels or "rgb"))


def open_backbone(config: ExtractConfig) -> Backbone:
    """Load the backbone that a (filled) config asks for."""
    return load_backbone(
        config.backbone or "resnet50",
        weights=config.weights,
        taps=config.taps,
        grid=config.grid,
        device=config.device,
        preprocessing={
            name: value
            for name in declarations(BackboneInput)
            if (value := getattr(config, name)) is not None
        },
    )


def describe(
    manifest: Manifest, config: ExtractConfig, backbone: Backbone, compute: str
) -> StoreDescription:
    """What the store will say about itself: taps, and the provenance behind its three digests."""
    precision = choose_precision(config)
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


def require_channels(manifest: Manifest, backbone: Backbone) -> None:
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


def require_image_root(manifest: Manifest) -> None:
    if not manifest.image_root.is_dir():
        raise InputError(
            f"image root {manifest.image_root}",
            expected="a folder",
            got="none",
            remedy="correct images in dataset.toml, or give `images`",
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


def require_images(manifest: Manifest) -> None:
    for bag in manifest.bags:
        if not _rows(manifest, bag.bag_id):
            raise InputError(
                f"{bag.file}:{bag.line}",
                expected="at least one image",
                got=f"none for bag {bag.bag_id!r}",
                remedy="add its images, remove the bag, or extract with `on_error=skip`",
            )
