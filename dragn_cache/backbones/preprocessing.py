"""How an image becomes a backbone's input: its size, and the statistics that it is normalised by.

Only the settings live here. Pixels are decoded, cropped and resized elsewhere; `Backbone` applies
the normalisation on its device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.models import Weights, WeightsEnum

from dragn_cache.backbones.families import family
from dragn_cache.backbones.weights import PublishedWeights, resolve_weights
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.images.intensity import Intensity

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos")
CHANNEL_MODES = ("rgb", "average", "each")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


MAX_SIDE = 8192  # a network's activations for more would not fit any machine


@dataclass(frozen=True)
class Preprocessing:
    """The settings between an image and a backbone.

    Args:
        size: (h, w) of the network's input in pixels.
        resize_shorter: resize the shorter side to this many pixels, keeping the aspect ratio, then
            cut `size` from the centre (torchvision's evaluation transform); None resizes the whole
            image to exactly `size`.
        mean: subtracted from each channel, on a scale of 0 to 1.
        std: what each channel is then divided by, on the same scale.
        interpolation: one of bilinear, bicubic, nearest, lanczos.
        channels: `rgb` feeds three channels to the network's three inputs; `average` feeds any
            number to a first convolution whose weights are the mean over those three inputs;
            `each` feeds one channel after the other to all three, and concatenates the features.
        rgb: the manifest's channels that are fed; None where three are and an image is in colour.
        intensity: how an image's numbers become 0 to 255, as `Intensity.parse` takes it.

    Raises:
        InputError: a value that no image could be prepared with.
    """

    size: tuple[int, int] = (224, 224)
    resize_shorter: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"
    channels: str = "rgb"
    rgb: tuple[str, ...] | None = None
    intensity: str = "full"

    def __post_init__(self) -> None:
        _require(_is_ints(self.size, 2), "size", "two whole numbers ≥ 1 (h, w)", self.size)
        _require(max(self.size) <= MAX_SIDE, "size", f"sides of at most {MAX_SIDE} px", self.size)
        shorter = self.resize_shorter
        fits = shorter is None or (_is_ints((shorter,), 1) and shorter >= max(self.size))
        wanted = f"None or a whole number ≥ {max(self.size)}, the larger side of size"
        _require(fits, "resize_shorter", wanted, shorter)
        _require(
            _is_floats(self.mean) and all(0 <= m <= 1 for m in self.mean),
            "mean",
            "three numbers on a scale of 0 to 1",
            self.mean,
        )
        _require(
            _is_floats(self.std) and all(s > 0 for s in self.std),
            "std",
            "three numbers > 0 on a scale of 0 to 1",
            self.std,
        )
        _require(
            self.interpolation in INTERPOLATIONS,
            "interpolation",
            f"one of {', '.join(INTERPOLATIONS)}",
            self.interpolation,
        )
        modes = ", ".join(CHANNEL_MODES)
        _require(self.channels in CHANNEL_MODES, "channels", f"one of {modes}", self.channels)
        three = self.channels == "rgb"
        _require(
            (three and self.rgb is None) or _are_names(self.rgb, 3 if three else None),
            "rgb",
            "None or three channel names" if three else "channel names",
            self.rgb,
            "change it, or take any number with --channels average or each"
            if three
            else "name them",
        )
        # From JSON and TOML come lists, and whole numbers where fractions are meant.
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        object.__setattr__(self, "rgb", None if self.rgb is None else tuple(self.rgb))
        # One text for each setting, so that what is recorded can be compared.
        object.__setattr__(self, "intensity", str(Intensity.parse(self.intensity)))

    @property
    def planes(self) -> int:
        """How many planes an image has when it comes to the backbone."""
        return 3 if self.channels == "rgb" or self.rgb is None else len(self.rgb)

    def override(self, **changes: Any) -> Preprocessing:
        """A copy with some settings changed.

        A new `size` alone means that the whole image is resized to it (`resize_shorter=None`): the
        centre crop of torchvision's transform would lose an image's borders, and with them cells.

        Raises:
            InputError: a value that cannot be used; UnknownNameError for an unknown setting.
        """
        _require_known_names(changes)
        if "size" in changes:
            changes = {"resize_shorter": None, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values, tuples as lists."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`.

        Raises:
            InputError: a setting is missing or cannot be used; UnknownNameError for an unknown one.
        """
        _require_known_names(values)
        missing = sorted({f.name for f in dataclasses.fields(cls)} - set(values))
        if missing:
            raise InputError(
                "preprocessing",
                expected="every setting",
                got=f"none for {', '.join(missing)}",
                remedy="give all of them, or override a default instead",
            )
        return cls(**values)


def default_preprocessing(
    name: str, weights: str | Path | Weights | WeightsEnum = "imagenet"
) -> Preprocessing:
    """The default preprocessing of a backbone's images.

    Args:
        name: the backbone.
        weights: as in `load_backbone`. Published weights bring their own evaluation transform; all
            others get the design's size (224, Inception 299) and ImageNet's statistics.

    Raises:
        UnknownNameError: no such backbone, or no such weights.
    """
    source = resolve_weights(name, weights)
    if not isinstance(source, PublishedWeights):
        side = family(name).image_size
        return Preprocessing(size=(side, side))
    transform = source.entry.transforms()
    (crop,), (shorter,) = transform.crop_size, transform.resize_size
    return Preprocessing(
        size=(crop, crop),
        resize_shorter=shorter,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        interpolation=transform.interpolation.value,
    )


def _require_known_names(values: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(Preprocessing)]
    for name in values:
        if name not in known:
            raise UnknownNameError("preprocessing setting", name, known)


def _require(
    holds: bool, setting: str, expected: str, got: object, remedy: str = "change it"
) -> None:
    if not holds:
        raise InputError(
            f"preprocessing {setting}", expected=expected, got=repr(got), remedy=remedy
        )


def _are_names(value: object, length: int | None) -> bool:
    """Whether a value is a list of names: so many, or None for any number but zero."""
    return (
        isinstance(value, tuple | list)
        and len(value) > 0
        and length in (None, len(value))
        and all(isinstance(name, str) and name for name in value)
    )


def _is_ints(value: object, length: int) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == length
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in value)
    )


def _is_floats(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 3
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    )
