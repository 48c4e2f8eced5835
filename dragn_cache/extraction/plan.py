"""Plan of an extraction: taps, preprocessing, precision and parts, decided before any work.

One device, each process of several, an update and the doctor's estimate make it by the same
function, `plan_extraction`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision

from dragn_cache.backbone_input import DEFAULT_BACKBONE, BackboneInput, Intensity
from dragn_cache.backbones import Backbone, load_backbone
from dragn_cache.errors import InputError
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.forward import Forward, choose_compute, require_compute
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
    plan_parts,
    read_description,
)
from dragn_cache.store.plan import PART_BYTES
from dragn_cache.types import CLEAN_VIEW

CROPS_BYTES = 2**27  # of the crops of one message from a decoding process


@dataclass(frozen=True)
class PlannedImage:
    """One image to decode, and the rows of its part that its crops become."""

    request: ImageRequest
    instances: tuple[tuple[int, Instance], ...]


@dataclass(frozen=True)
class ExtractionPlan:
    """All that is decided before the first image is decoded.

    Attributes:
        config: filled with the data set's defaults.
        backbone: loaded, on its device.
        compute: ``eager`` or ``compiled``; ``precision``: ``float32`` or ``bfloat16``.
        description: what a new store says about itself.
        bag_sizes: instances of each bag of the manifest.
        parts: of a new store; a store that exists keeps its own.
    """

    manifest: Manifest
    config: ExtractConfig
    backbone: Backbone
    compute: str
    precision: str
    description: StoreDescription
    bag_sizes: tuple[int, ...]
    parts: tuple[PartPlan, ...]

    @property
    def instances(self) -> int:
        """Instances of all bags."""
        return sum(self.bag_sizes)

    def images_of(self, part: PartPlan) -> list[PlannedImage]:
        """A part's images in order of first appearance, and which rows each one feeds.

        An image whose crops would fill more than `CROPS_BYTES` comes again for the rest of them.
        """
        by_image: dict[str, list[tuple[int, Instance]]] = {}
        row = 0
        for bag in part.bags:
            for instance in instances_of(self.manifest, bag):
                by_image.setdefault(instance.image, []).append((row, instance))
                row += 1
        most = max(1, CROPS_BYTES // self._crop_bytes())
        return [
            PlannedImage(self._request(image, group), tuple(group))
            for image, rows in by_image.items()
            for group in (rows[k : k + most] for k in range(0, len(rows), most))
        ]

    def _crop_bytes(self) -> int:
        """The bytes of a crop with its views, as it goes to the network."""
        settings = self.backbone.preprocessing
        height, width = settings.size
        inputs = max(3, len(settings.rgb or ()))
        return inputs * height * width * len(self.description.views)

    def _request(self, image: str, rows: Sequence[tuple[int, Instance]]) -> ImageRequest:
        settings, channels = self.backbone.preprocessing, self.manifest.channels
        names, planes = plan_channels(image, channels, settings.rgb, settings.channels)
        return ImageRequest(
            image,
            image_files(self.manifest, image, names),
            planes,
            tuple(instance.box for _, instance in rows),
            Geometry(settings.size, settings.resize_shorter, settings.interpolation),
            Intensity.parse(settings.intensity),
            len(channels),
            self.config.augmentation,
            tuple(instance.bag_id for _, instance in rows),
        )

    def create_forward(self) -> Forward:
        """The network as it computes in this plan, not warmed up."""
        return Forward(
            self.backbone,
            compute=self.compute,
            batch_size=self.config.batch_size,
            dtype=self.config.dtype,
            precision=self.precision,
        )


def plan_extraction(
    manifest: Manifest,
    config: ExtractConfig,
    store: Path | None,
    *,
    backbone_device: str | None = None,
) -> ExtractionPlan:
    """Load the backbone and decide how its features are computed and cut into parts.

    Args:
        config: filled (`ExtractConfig.with_defaults`, `with_channels`), with one device.
        store: if there is a store, it decides how to compute; None plans as for a new one.
        backbone_device: where the backbone is loaded; None is ``config.device``. A process that
            only plans keeps off the GPUs of those that compute.

    Raises:
        InputError: backbone, weights, taps, channels or device cannot be used.
        DragnCacheError: this machine cannot compute in the way asked for.
    """
    backbone = open_backbone(config.replace(device=backbone_device or config.device))
    bag_sizes = tuple(len(instances_of(manifest, bag)) for bag in range(len(manifest.bags)))
    compute = decide_compute(store, config, backbone, sum(bag_sizes))
    precision = choose_precision(config)
    description = describe(manifest, config, backbone, compute, precision)
    parts = plan_parts(bag_sizes, description.row_bytes, config.part_instances)
    require_channels(manifest, backbone)
    return ExtractionPlan(
        manifest, config, backbone, compute, precision, description, bag_sizes, tuple(parts)
    )


def decide_compute(
    store: Path | None, config: ExtractConfig, backbone: Backbone, images: int
) -> str:
    """As asked for; else as the store there was begun; else what the whole plan pays for."""
    compute: str = config.compute
    if compute == "auto" and store is not None and (store / "store.json").exists():
        stored = read_description(store).provenance["numerics"].get("compute")
        compute = stored if stored in ("eager", "compiled") else "auto"
    if compute == "auto":
        compute = choose_compute(backbone, images * (1 + config.views), config.batch_size)
    require_compute(compute, backbone.mean.device.type)
    return compute


def choose_precision(config: ExtractConfig) -> str:
    """The precision asked for; by default bfloat16 on a GPU and float32 on the CPU."""
    if config.precision != "auto":
        return config.precision
    return "bfloat16" if torch.device(config.device).type == "cuda" else "float32"


def with_channels(manifest: Manifest, config: ExtractConfig) -> ExtractConfig:
    """The settings with the channels named, so that provenance can name them."""
    if config.rgb is not None:
        return config
    return config.replace(rgb=_default_rgb(manifest, config.channels or "rgb"))


def open_backbone(config: ExtractConfig) -> Backbone:
    """Load the backbone that a (filled) config asks for."""
    return load_backbone(
        config.backbone or DEFAULT_BACKBONE,
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
    manifest: Manifest, config: ExtractConfig, backbone: Backbone, compute: str, precision: str
) -> StoreDescription:
    """The store's description: taps, views, and the provenance behind its three digests."""
    return StoreDescription(
        format=config.format,
        taps=tuple(Tap(name, shape, config.dtype) for name, shape in backbone.tap_shapes.items()),
        provenance={
            "features": {
                **backbone.provenance(),
                "augmentation": config.augmentation and config.augmentation.to_dict(),
            },
            "numerics": _numerics(config, compute, precision),
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


def _numerics(config: ExtractConfig, compute: str, precision: str) -> dict[str, Any]:
    """Provenance of the features' last digits."""
    return {
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
    }


def require_channels(manifest: Manifest, backbone: Backbone) -> None:
    """Raise InputError if the channels asked for are not there, before anything is written."""
    settings = backbone.preprocessing
    # Whether each channel has a file of its own is all that matters of a path: one image of each.
    images = {
        "{channel}" in row.image: row.image for rows in manifest.instances.values() for row in rows
    }
    for image in images.values():
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


def require_image_root(manifest: Manifest) -> None:
    """Raise InputError if the folder of the images is not there."""
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
    """Raise InputError if a bag has no images."""
    for number, bag in enumerate(manifest.bags):
        if not instances_of(manifest, number):
            raise InputError(
                f"{bag.file}:{bag.line}",
                expected="at least one image",
                got=f"none for bag {bag.bag_id!r}",
                remedy="add its images, remove the bag, or extract with `on_error=skip`",
            )
