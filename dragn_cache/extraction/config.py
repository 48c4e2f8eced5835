"""Settings of an extraction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dragn_cache.images.augment import Augmentation
from dragn_cache.images.intensity import Intensity
from dragn_cache.machine import default_workers
from dragn_cache.old_options import at_least, one_of

OnError = Literal["stop", "skip"]


@dataclass(frozen=True)
class ExtractConfig:
    """Settings of stage one. None means: the data set's default, else the backbone's.

    Attributes:
        backbone: name of a torchvision classification network.
        weights: ``imagenet``, a torchvision weights name, ``random[:SEED]``, or a file.
        taps: outputs to store, by module name; None is the last map and its spatial mean.
        size: height and width of the backbone's input in pixels.
        grid: pool maps to grid × grid before storing.
        channels: ``rgb`` feeds three of them to the backbone, ``average`` any number through a
            first convolution with averaged weights, ``each`` one after the other, concatenated.
        rgb: channels of the data set that are used.
        intensity: how pixels become 0 to 255, as `Intensity.parse` takes it.
        mean, std, interpolation: the backbone's preprocessing.
        format: how parts are written.
        dtype: how features are stored.
        part_instances: the most instances of a part (4096 and 128 MB bound it anyway).
        batch_size: instances of a forward pass.
        workers: processes that decode; 0 decodes in the main process.
        device: ``cpu``, ``cuda`` or ``cuda:N``; several, separated by commas, share the work.
        on_error: ``stop`` at the first input that cannot be used, or ``skip`` and record it.
        max_errors: with ``skip``, stop after all when more inputs than that cannot be used.
        compute: ``eager``, ``compiled``, or ``auto``: as the store was begun, else what the size
            of the plan and this machine make faster.
        precision: of the network: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 on
            a GPU.
        views: augmented copies of every instance beside the clean one.
        augment: what makes them differ, as ``flip,rotate90,crop:0.7``; see `Augmentation`.
        seed: of the augmentation.
    """

    backbone: str | None = None
    weights: str = "imagenet"
    taps: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    grid: int | None = None
    channels: str | None = None
    rgb: tuple[str, ...] | None = None
    intensity: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    format: Literal["hdf5", "zarr"] = "hdf5"
    dtype: Literal["float16", "float32"] = "float16"
    part_instances: int = 4096
    batch_size: int = 32
    workers: int = field(default_factory=default_workers)
    device: str = "cpu"
    on_error: OnError = "stop"
    max_errors: int | None = None
    compute: Literal["auto", "eager", "compiled"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    views: int = 0
    augment: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("--format", self.format, ("hdf5", "zarr"))
        if self.channels is not None:
            one_of("--channels", self.channels, ("rgb", "average", "each"))
        if self.intensity is not None:
            Intensity.parse(self.intensity)
        one_of("--dtype", self.dtype, ("float16", "float32"))
        one_of("--on-error", self.on_error, ("stop", "skip"))
        at_least("--part-instances", self.part_instances, 1)
        at_least("--batch-size", self.batch_size, 1)
        at_least("--workers", self.workers, 0)
        at_least("--views", self.views, 0)
        at_least("--seed", self.seed, 0)
        Augmentation.parse(self.augment, self.views, self.seed)
        one_of("--compute", self.compute, ("auto", "eager", "compiled"))
        one_of("--precision", self.precision, ("auto", "float32", "bfloat16"))
        if self.grid is not None:
            at_least("--grid", self.grid, 1)
        if self.max_errors is not None:
            at_least("--max-errors", self.max_errors, 0)

    @property
    def augmentation(self) -> Augmentation | None:
        """What makes the augmented views; None without any."""
        return Augmentation.parse(self.augment, self.views, self.seed)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices' names."""
        return tuple(name.strip() for name in self.device.split(","))

    def with_defaults(self, defaults: Mapping[str, Any]) -> ExtractConfig:
        """Fill what was not asked for from a data set's ``[extract]`` table.

        Its taps belong to its backbone: with another backbone they are left out.
        """
        given = {key: value for key, value in asdict(self).items() if value is not None}
        own = defaults.get("backbone")
        if self.backbone is not None and own is not None and self.backbone != own:
            defaults = {key: value for key, value in defaults.items() if key != "taps"}
        filled: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in defaults.items()
            if key not in given
        }
        rgb = filled.get("rgb", self.rgb)
        mode = filled.get("channels", self.channels) or "rgb"
        if (
            mode == "rgb" and rgb is not None and len(rgb) == 1
        ):  # one channel feeds all three inputs
            filled["rgb"] = tuple(rgb) * 3
        filled.setdefault("backbone", given.get("backbone", "resnet50"))
        return replace(self, **filled)
