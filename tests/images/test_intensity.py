"""Intensities: values worked out by hand, one text for each setting, and what cannot be scaled."""

from __future__ import annotations

import numpy as np
import pytest

from dragn_cache.backbone_input import Intensity
from dragn_cache.errors import InputError
from dragn_cache.images.intensity import scale, scale_planes

F4 = np.float32


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("full", "full"),
        ("0:4095", "0:4095"),
        ("-1.50:+2e3", "-1.5:2000"),
        ("percentile:1.0:99.80", "percentile:1:99.8"),
        ("channel-percentile:0:100", "channel-percentile:0:100"),
    ],
)
def test_each_setting_has_one_text(text: str, canonical: str) -> None:
    assert str(Intensity.parse(text)) == canonical
    assert Intensity.parse(canonical) == Intensity.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^intensity: expected full, LOW:HIGH, percentile:LOW:HIGH or .*, got ''"),
        ("auto", "got 'auto'; write 0:4095"),
        ("0-4095", "got '0-4095'"),
        ("nan:5", "got 'nan:5'"),
        ("5:5", "expected LOW below HIGH, got '5:5'"),
        ("-1e308:1e308", "expected LOW below HIGH"),
        ("percentile:-1:50", "expected LOW below HIGH, both of 0 to 100, got"),
        ("channel-percentile:1:101", "both of 0 to 100"),
    ],
)
def test_texts_that_are_no_setting(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Intensity.parse(text)


def test_by_hand() -> None:
    """255 · 1/510 = 0.5 and 255 · 3/510 = 1.5: halves go to the even number."""
    values = np.array([[-7, 0, 1, 2, 3, 509, 510, 777]])
    expected = [[0, 0, 0, 1, 2, 254, 255, 255]]
    for dtype in (np.int32, F4, np.float64):
        np.testing.assert_array_equal(scale(values.astype(dtype), 0, 510), expected)
    np.testing.assert_array_equal(
        scale(values[:, 1:].astype(np.uint16), 0, 510)[0], expected[0][1:]
    )


def test_sixteen_bits_over_their_full_range() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    (got,) = scale_planes([every], [65535.0], Intensity())
    # 65535 / 255 = 257: each grey takes the 257 numbers around its multiple of 257.
    expected = (np.arange(65536) + 128) // 257
    np.testing.assert_array_equal(got.ravel(), expected)


def test_eight_bits_stay_as_they_are_only_at_full_range() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(4, 64)
    (full,) = scale_planes([every], [255.0], Intensity())
    np.testing.assert_array_equal(full, every)
    (half,) = scale_planes([every], [255.0], Intensity.parse("0:51"))
    np.testing.assert_array_equal(half.ravel()[:53], [*range(0, 256, 5), 255])


def test_percentiles_of_all_channels_together_or_of_each() -> None:
    dim, bright = np.array([[0, 17, 34]], np.uint16), np.array([[0, 51, 102]], np.uint16)
    full = [65535.0] * 2
    together = scale_planes([dim, bright], full, Intensity.parse("percentile:0:100"))
    np.testing.assert_array_equal(together, [[[0, 42, 85]], [[0, 128, 255]]])  # 42.5, 127.5
    apart = scale_planes([dim, bright], full, Intensity.parse("channel-percentile:0:100"))
    np.testing.assert_array_equal(apart, [[[0, 128, 255]]] * 2)
    # Percentiles 25 and 75 of 0 17 34 lie at 8.5 and 25.5.
    (inner,) = scale_planes([dim], full[:1], Intensity.parse("percentile:25:75"))
    np.testing.assert_array_equal(inner, [[0, 128, 255]])


@pytest.mark.parametrize("text", ["percentile:1:99", "channel-percentile:0:100"])
def test_a_constant_image_is_black(text: str) -> None:
    (got,) = scale_planes([np.full((3, 5), 9, F4)], [None], Intensity.parse(text))
    np.testing.assert_array_equal(got, np.zeros((3, 5)))


def test_more_than_a_block_is_scaled_alike() -> None:
    values = np.arange(1031 * 1033, dtype=F4).reshape(1031, 1033) % 256
    np.testing.assert_array_equal(scale(values, 0, 255), values)


def test_what_cannot_be_scaled() -> None:
    with pytest.raises(InputError, match=r"have no full range, got full, for float32 pixels; give"):
        scale_planes([np.zeros((2, 3), F4)], [None], Intensity())
    mixed = [np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint16)]
    with pytest.raises(InputError, match=r"got uint16 and uint8 pixels; give .*channel-percentile"):
        scale_planes(mixed, [255.0, 65535.0], Intensity.parse("percentile:1:99"))
    huge = np.array([[-1e308, 1e308]])
    with pytest.raises(InputError, match=r"can be computed with, got .* to 1e\+308; give"):
        scale_planes([huge], [None], Intensity.parse("percentile:0:100"))
