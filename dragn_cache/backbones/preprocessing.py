"""How an image becomes a backbone's input: its size, and the statistics that it is normalised by.

Only the settings live here. Pixels are decoded, cropped and resized elsewhere; `Backbone` applies
the normalisation on its device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.models import Weights, WeightsEnum

from dragn_cache.backbone_input import BackboneInput, ChannelMode, Intensity, Interpolation
from dragn_cache.backbones.families import family
from dragn_cache.backbones.weights import PublishedWeights, resolve_weights
from dragn_cache.errors import InputError, SettingError, UnknownNameError
from dragn_cache.options import declarations

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone's images are prepared: every setting of `BackboneInput`, decided.

    Args:
        size: (h, w) of the network's input in pixels.
        resize_shorter: resize the shorter side to this many pixels, keeping the aspect ratio, then
            cut `size` from the centre (torchvision's evaluation transform); None resizes the whole
            image to exactly `size`.
        mean: subtracted from each channel, on a scale of 0 to 1.
        std: what each channel is then divided by, on the same scale.
        interpolation: how crops are resized.
        channels: `rgb` feeds three channels to the network's three inputs; `average` feeds any
            number to a first convolution whose weights are the mean over those three inputs;
            `each` feeds one channel after the other to all three, and concatenates the features.
        rgb: the manifest's channels that are fed; None where three are and an image is in colour.
        intensity: how an image's numbers become 0 to 255, as `Intensity.parse` takes it.

    Raises:
        SettingError: a value that no image could be prepared with.
    """

    size: tuple[int, int] = (224, 224)
    resize_shorter: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    channels: ChannelMode = "rgb"
    rgb: tuple[str, ...] | None = None
    intensity: str = "full"

    def __post_init__(self) -> None:
        declared = declarations(BackboneInput)
        settings = BackboneInput(**{name: getattr(self, name) for name in declared})
        for name, value in settings.to_dict().items():
            if value is None and name != "rgb":
                raise declared[name].error(None)
            # From JSON and TOML come lists, and whole numbers where fractions are meant.
            object.__setattr__(self, name, value)
        # One text for each setting, so that what is recorded can be compared.
        object.__setattr__(self, "intensity", str(Intensity.parse(self.intensity)))
        self._require_resize()
        self._require_channels()

    def _require_resize(self) -> None:
        shorter, side = self.resize_shorter, max(self.size)
        if shorter is not None and (type(shorter) is not int or shorter < side):
            raise SettingError(
                "resize_shorter",
                expected=f"None or a whole number of at least {side}, the larger side of `size`",
                got=repr(shorter),
                remedy="change it",
            )

    def _require_channels(self) -> None:
        three = self.channels == "rgb"
        if (self.rgb is None and not three) or (three and self.rgb and len(self.rgb) != 3):
            raise SettingError(
                "rgb",
                expected="None or three channels' names" if three else "channels' names",
                got=repr(self.rgb),
                remedy="change it, or take any number with `channels=average` or `channels=each`"
                if three
                else "name them",
            )

    @property
    def planes(self) -> int:
        """How many planes an image has when it comes to the backbone."""
        return 3 if self.channels == "rgb" or self.rgb is None else len(self.rgb)

    def override(self, **changes: Any) -> Preprocessing:
        """A copy with some settings changed.

        A new `size` alone means that the whole image is resized to it (`resize_shorter=None`): the
        centre crop of torchvision's transform would lose an image's borders, and with them cells.

        Raises:
            SettingError: a value that cannot be used; UnknownNameError for an unknown setting.
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
