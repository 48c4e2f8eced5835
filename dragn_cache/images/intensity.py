"""Scaling of a file's numbers to 0 to 255: one setting, written as text.

====================================  ===========================================================
``full``                              0 → 0, the largest number of the file's bits → 255
``LOW:HIGH``                          LOW → 0, HIGH → 255, in the file's own units
``percentile:LOW:HIGH``               those percentiles over all of an image's channels together
``channel-percentile:LOW:HIGH``       those percentiles of each channel alone
====================================  ===========================================================

Percentiles are those of the whole image, before anything is cut from it, so crops of it agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dragn_cache.backbone_input import Intensity
from dragn_cache.errors import SettingError

_BLOCK = 2**20  # pixels scaled at a time, so that double precision takes little memory


FULL = Intensity()
FEW_LEVELS = 64  # of 256


def few_levels(levels: tuple[int, int]) -> bool:
    """Whether scaled images, from the lowest to the highest level of all, fill few of the 256."""
    return levels[1] - levels[0] < FEW_LEVELS


def scale_planes(
    planes: Sequence[NDArray[np.generic]], full: Sequence[float | None], intensity: Intensity
) -> list[NDArray[np.uint8]]:
    """The planes (each (h, w), finite numbers) as uint8.

    Args:
        full: for each plane, the largest number of its bits; None where it is not known.

    Raises:
        SettingError: the setting cannot be applied to these planes.
    """
    return [
        scale(plane, low, high)
        for plane, (low, high) in zip(planes, _ranges(planes, full, intensity), strict=True)
    ]


def scale(values: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    """255 · (v − low) / (high − low), clipped, to the nearest (even) whole number; uint8.

    Where ``low`` equals ``high`` (a constant image) all is 0.
    """
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values.view(np.uint8)
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    if values.dtype in (np.uint8, np.uint16):  # few numbers: a table is exact and fast
        table = _scaled(np.arange(256**values.dtype.itemsize), low, high)
        return np.take(table, values.view(np.uint8 if values.itemsize == 1 else np.uint16))
    flat = values.reshape(-1)
    result = np.empty(flat.shape, np.uint8)
    for start in range(0, flat.size, _BLOCK):
        result[start : start + _BLOCK] = _scaled(flat[start : start + _BLOCK], low, high)
    return result.reshape(values.shape)


def _scaled(values: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    clipped = np.clip(values.astype(np.float64), low, high)
    return np.rint(255 * (clipped - low) / (high - low)).astype(np.uint8)


def _ranges(
    planes: Sequence[NDArray[np.generic]], full: Sequence[float | None], intensity: Intensity
) -> list[tuple[float, float]]:
    if intensity.kind == "full":
        return [(0.0, _full(plane, most)) for plane, most in zip(planes, full, strict=True)]
    if intensity.kind == "range":
        return [(intensity.low, intensity.high)] * len(planes)
    if intensity.kind == "channel-percentile":
        return [_percentiles([plane], intensity) for plane in planes]
    return [_percentiles(planes, intensity)] * len(planes)


def _full(plane: NDArray[np.generic], most: float | None) -> float:
    if most is None:
        raise SettingError(
            "intensity",
            expected="a range, as these pixels have no full range",
            got=f"full, for {plane.dtype} pixels",
            remedy="give `intensity=LOW:HIGH` or percentile:LOW:HIGH",
        )
    return most


def _percentiles(
    planes: Sequence[NDArray[np.generic]], intensity: Intensity
) -> tuple[float, float]:
    kinds = sorted({str(plane.dtype) for plane in planes})
    if len(kinds) > 1:
        raise SettingError(
            "intensity",
            expected="channels of one kind of pixels, to take percentiles of all together",
            got=f"{' and '.join(kinds)} pixels",
            remedy="give `intensity=channel-percentile:LOW:HIGH`",
        )
    values = planes[0] if len(planes) == 1 else np.stack(list(planes))
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked below
        low, high = np.percentile(values, (intensity.low, intensity.high))
    if not math.isfinite(255 * (float(high) - float(low))):
        raise SettingError(
            "intensity",
            expected="percentiles of a range that can be computed with",
            got=f"{low:g} to {high:g}",
            remedy="give `intensity=LOW:HIGH`",
        )
    return float(low), float(high)
