"""Random changes to crops; an augmented view of an instance has the same bytes in every run.

Every random number of a view comes from one generator. Its key is the seed, the bag, the image, the
box and the view's name, so neither other draws, nor the order of the work, nor the process matter.
Steps work on a crop before it is resized, so they may change its shape. They take any number of
channels P; geometric steps move all channels alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import SettingError, UnknownNameError
from dragn_cache.types import CLEAN_VIEW, Pixels

if TYPE_CHECKING:
    from PIL import Image


Key = tuple[str, str, tuple[int, int, int, int] | None, str]
"""The key of a view's random numbers, besides the seed: bag id, image, box, view name."""


# --- the steps ---------------------------------------------------------------------------------


def _flip(crop: Pixels, draw: np.random.Generator, strength: float) -> Pixels:
    return _vflip(_hflip(crop, draw, strength), draw, strength)


def _hflip(crop: Pixels, draw: np.random.Generator, strength: float) -> Pixels:
    return crop[:, :, ::-1] if draw.random() < 0.5 else crop


def _vflip(crop: Pixels, draw: np.random.Generator, strength: float) -> Pixels:
    return crop[:, ::-1] if draw.random() < 0.5 else crop


def _rotate90(crop: Pixels, draw: np.random.Generator, strength: float) -> Pixels:
    return np.rot90(crop, int(draw.integers(4)), axes=(1, 2))


def _rotate(crop: Pixels, draw: np.random.Generator, degrees: float) -> Pixels:
    """Around the centre, bilinear; beyond its edges the crop is continued by its mirror image."""
    angle = draw.uniform(-degrees, degrees)
    _, h, w = crop.shape
    # The reach of the rotated rectangle beyond the crop; bilinear reads one pixel further.
    cos, sin = abs(np.cos(np.radians(angle))), abs(np.sin(np.radians(angle)))
    top = int(np.ceil(max(0.0, h * cos + w * sin - h) / 2)) + 2
    left = int(np.ceil(max(0.0, w * cos + h * sin - w) / 2)) + 2
    padded = np.pad(crop, ((0, 0), (top, top), (left, left)), mode="symmetric")
    from PIL.Image import Resampling

    rotated = _each_plane(padded, lambda plane: plane.rotate(angle, Resampling.BILINEAR))
    return rotated[:, top : top + h, left : left + w]


def _crop(crop: Pixels, draw: np.random.Generator, fraction: float) -> Pixels:
    """A part anywhere in the crop, of the same aspect up to rounding."""
    scale = np.sqrt(draw.uniform(fraction, 1.0))
    (top, height), (left, width) = (
        (int(draw.integers(side - cut + 1)), cut)
        for side, cut in ((side, min(side, int(np.ceil(scale * side)))) for side in crop.shape[1:])
    )
    return crop[:, top : top + height, left : left + width]


def _noise(crop: Pixels, draw: np.random.Generator, deviation: float) -> Pixels:
    noise = draw.standard_normal(crop.shape, dtype=np.float32)
    return _to_uint8(crop + noise * np.float32(255 * deviation))


def _brightness(crop: Pixels, draw: np.random.Generator, strength: float) -> Pixels:
    return _to_uint8(crop * np.float32(draw.uniform(1 - strength, 1 + strength)))


def _contrast(crop: Pixels, draw: np.random.Generator, strength: float) -> Pixels:
    """Around each channel's own mean, so that a dark channel is not brightened by the others."""
    mean = crop.mean(axis=(1, 2), keepdims=True, dtype=np.float64).astype(np.float32)
    return _to_uint8(mean + (crop - mean) * np.float32(draw.uniform(1 - strength, 1 + strength)))


def _gamma(crop: Pixels, draw: np.random.Generator, strength: float) -> Pixels:
    """Values 0..1 to a power between 1/(1+F) and 1+F, as often below 1 as above."""
    power = np.exp(draw.uniform(-1, 1) * np.log1p(strength))
    table = _to_uint8(255 * (np.arange(256) / 255) ** power)
    return table[crop]


def _blur(crop: Pixels, draw: np.random.Generator, sigma_max_px: float) -> Pixels:
    from PIL import ImageFilter

    gaussian = ImageFilter.GaussianBlur(draw.uniform(0, sigma_max_px))
    return _each_plane(crop, lambda plane: plane.filter(gaussian))


def _grey(crop: Pixels, draw: np.random.Generator, probability: float) -> Pixels:
    if draw.random() >= probability:
        return crop
    mean = _to_uint8(crop.mean(axis=0, keepdims=True, dtype=np.float64))
    return np.repeat(mean, len(crop), axis=0)


def _each_plane(crop: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    # Imported here: settings import this module, and training must load no image library.
    from PIL import Image

    planes = [change(Image.fromarray(np.ascontiguousarray(plane))) for plane in crop]
    return np.stack([np.asarray(plane) for plane in planes])


def _to_uint8(values: NDArray[Any]) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)


class Step(NamedTuple):
    """A step: its function, and its default, least and largest strength (None: it takes none).

    The function takes a crop, the generator and the strength, and gives a crop.
    """

    change: Callable[[Pixels, np.random.Generator, float], Pixels]
    default: float | None = None
    least: float = 0.0
    most: float = 0.0


STEPS = {
    "flip": Step(_flip),  # horizontally and vertically, each with probability ½
    "hflip": Step(_hflip),  # left and right, probability ½
    "vflip": Step(_vflip),  # top and bottom, probability ½
    "rotate90": Step(_rotate90),  # by 0, 90, 180 or 270°
    "rotate": Step(_rotate, 15.0, 0.0, 180.0),  # by up to ± so many degrees
    "crop": Step(_crop, 0.7, 0.01, 1.0),  # to at least this fraction of the area
    "noise": Step(_noise, 0.02, 0.0, 1.0),  # Gaussian of this deviation, as a fraction of 255
    "brightness": Step(_brightness, 0.2, 0.0, 1.0),  # values times 1 − F .. 1 + F
    "contrast": Step(_contrast, 0.2, 0.0, 1.0),  # distances from the mean times 1 − F .. 1 + F
    "gamma": Step(_gamma, 0.2, 0.0, 9.0),  # values to the power 1 / (1 + F) .. 1 + F
    "blur": Step(_blur, 1.0, 0.0, 50.0),  # Gaussian of 0 .. this many pixels of the crop
    "grey": Step(_grey, 0.2, 0.0, 1.0),  # all channels become their mean, with this probability
}


# --- settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """The steps, number and seed of a store's augmented views.

    Attributes:
        steps: in the order in which they are applied, as ``flip`` or ``crop:0.7``; a strength
            that is left out is resolved to the step's default.
        views: augmented copies of each instance, besides the clean one; at least 1.
        seed: of all random numbers.

    Raises:
        UnknownNameError: a step that is not in `STEPS`.
        SettingError: a strength or a number out of its range.
    """

    steps: tuple[str, ...]
    views: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps:
            raise SettingError(
                "augment",
                expected="steps that make the views differ",
                got="none",
                remedy="give `augment=flip,rotate90`, say, or leave out `views`",
            )
        for name, value, least in (("views", self.views, 1), ("seed", self.seed, 0)):
            if value < least:
                raise SettingError(
                    name,
                    expected=f"at least {least} with `augment`",
                    got=str(value),
                    remedy="give a larger number, or leave out `augment`",
                )
        object.__setattr__(self, "steps", tuple(_resolved(step) for step in self.steps))

    @classmethod
    def parse(cls, text: str | None, views: int, seed: int = 0) -> Augmentation | None:
        """Read ``flip,rotate90,crop:0.7``; None without steps and views."""
        if text is None and views == 0:
            return None
        steps = tuple(step.strip() for step in (text or "").split(",") if step.strip())
        return cls(steps, views, seed)

    @property
    def view_names(self) -> tuple[str, ...]:
        """The store's views: the clean one, then the augmented ones."""
        return tuple(str(k) for k in range(self.views + 1))

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the views, as JSON holds it."""
        return {**asdict(self), "steps": list(self.steps)}


def _resolved(text: str) -> str:
    """A step's text with its strength: ``crop`` as ``crop:0.7``; a name alone if it takes none."""
    name, colon, number = text.partition(":")
    if name not in STEPS:
        raise UnknownNameError("augmentation step", name, STEPS)
    step = STEPS[name]
    if step.default is None:
        if colon:
            raise SettingError(
                "augment", expected=f"{name} alone", got=repr(text), remedy="leave out the number"
            )
        return name
    try:
        strength = float(number) if colon else step.default
    except ValueError:
        strength = float("nan")
    if not step.least <= strength <= step.most:
        raise SettingError(
            "augment",
            expected=f"{name}:F with F from {step.least:g} to {step.most:g}",
            got=repr(text),
            remedy=f"change it, or write {name} for {step.default:g}",
        )
    return f"{name}:{strength!r}"


# --- views -------------------------------------------------------------------------------------


def augmented(crop: Pixels, augmentation: Augmentation, key: Key) -> Pixels:
    """One view of a crop.

    Args:
        crop: (P, h, w) uint8, before it is resized.
        key: bag id, image, box and the view's name; the clean view is the crop as it is.

    Returns:
        (P, h', w') uint8, contiguous; only crop and rotate90 change h and w.
    """
    if key[3] == CLEAN_VIEW:
        return crop
    draw = generator(augmentation.seed, key)
    for text in augmentation.steps:
        name, _, strength = text.partition(":")
        crop = STEPS[name].change(crop, draw, float(strength or 0))
    return np.ascontiguousarray(crop)


def generator(seed: int, key: Key) -> np.random.Generator:
    """Philox keyed by the first 16 bytes of sha256 over canonical JSON of seed and key."""
    bag_id, image, box, view = key
    corners = None if box is None else [int(edge) for edge in box]
    text = json.dumps(
        [int(seed), bag_id, image, corners, view], separators=(",", ":"), ensure_ascii=False
    )
    digest = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
