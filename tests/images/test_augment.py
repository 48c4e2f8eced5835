"""Augmentation: the key of the random numbers, each step by hand or by its bounds, and errors."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.images.augment import STEPS, Augmentation, Key, augmented, generator
from dragn_cache.types import Pixels

ALL = "flip,rotate90,rotate,crop,noise,brightness,contrast,gamma,blur,grey"
KEY: Key = ("007", "a/ü 1.png", (3, 5, 40, 58), "1")
DRAWS = 400
GEOMETRIC = ("flip", "hflip", "vflip", "rotate90", "rotate", "crop")


def made(text: str, *, views: int = 3, seed: int = 11) -> Augmentation:
    augmentation = Augmentation.parse(text, views, seed)
    assert augmentation is not None
    return augmentation


def crop(planes: int = 5, h: int = 37, w: int = 53, *, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (planes, h, w), dtype=np.uint8)


def keys(count: int = DRAWS) -> list[Key]:
    return [("bag", f"{k}.png", None, "1") for k in range(count)]


def many(text: str, source: Pixels, count: int = DRAWS) -> list[Pixels]:
    return [augmented(source, made(text), key) for key in keys(count)]


# --- the key of the random numbers -------------------------------------------------------------


def test_another_process_makes_the_same_bytes_whatever_it_drew_before() -> None:
    code = f"""
import hashlib, sys
import numpy as np
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_augment import ALL, KEY, augmented, crop, made
np.random.default_rng().random(5)
augmented(crop(seed=3), made(ALL), ("other", "b.png", None, "2"))
print(hashlib.sha256(augmented(crop(), made(ALL), KEY)).hexdigest())
"""
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    here = hashlib.sha256(augmented(crop(), made(ALL), KEY)).hexdigest()
    assert printed == [here, here]


@pytest.mark.parametrize(
    "other",
    [
        ("07", "a/ü 1.png", (3, 5, 40, 58), "1"),
        ("007", "a/u 1.png", (3, 5, 40, 58), "1"),
        ("007", "a/ü 1.png", (3, 5, 40, 59), "1"),
        ("007", "a/ü 1.png", None, "1"),
        ("007", "a/ü 1.png", (3, 5, 40, 58), "2"),
        ("007a/ü 1.png", "", (3, 5, 40, 58), "1"),
    ],
)
def test_every_part_of_the_key_counts(other: Key) -> None:
    first = augmented(crop(), made("noise"), KEY)
    assert np.array_equal(first, augmented(crop(), made("noise"), KEY))
    assert (first != augmented(crop(), made("noise"), other)).any()


def test_the_seed_counts_and_the_number_of_views_does_not() -> None:
    first = augmented(crop(), made(ALL), KEY)
    assert np.array_equal(first, augmented(crop(), made(ALL, views=7), KEY))
    other = augmented(crop(), made(ALL, seed=12), KEY)
    assert other.shape != first.shape or (other != first).any()


def test_numbers_of_any_kind_are_the_same_key() -> None:
    box = tuple(np.array([3, 5, 40, 58]))
    assert generator(11, (KEY[0], KEY[1], box, "1")).random() == generator(11, KEY).random()


def test_the_draw_is_philox_keyed_by_the_documented_digest() -> None:
    text = '[11,"007","a/ü 1.png",[3,5,40,58],"1"]'
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    philox = np.random.Philox(key=np.frombuffer(digest[:16], "<u8"))
    assert generator(11, KEY).random() == np.random.Generator(philox).random()


def test_the_clean_view_is_the_crop() -> None:
    source = crop()
    assert augmented(source, made(ALL), (*KEY[:3], "0")) is source


@pytest.mark.parametrize("name", STEPS)
def test_steps_leave_the_source_alone_and_work_on_any_shape(name: str) -> None:
    for shape in ((1, 1, 1), (5, 1, 7), (2, 11, 1), (3, 13, 17), (7, 5, 3)):
        source = crop(*shape)
        kept = source.copy()
        for result in many(name, source, 11):
            assert result.dtype == np.uint8
            assert result.flags.c_contiguous
            assert len(result) == shape[0]
            assert result.size > 0
        assert np.array_equal(source, kept)


# --- geometry ----------------------------------------------------------------------------------

SMALL = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3)  # plane p: [[6p, 6p+1, 6p+2], …]


def counted(text: str, expected: dict[str, list[list[int]]]) -> dict[str, int]:
    """Counts of the named pictures among results, by plane 0; all planes must show the same."""
    counts = dict.fromkeys(expected, 0)
    for result in many(text, SMALL):
        name = next(n for n, plane in expected.items() if result[0].tolist() == plane)
        counts[name] += 1
        assert np.array_equal(result, result[:1] + 6 * np.arange(5, dtype=np.uint8)[:, None, None])
    return counts


def about(share: float, count: int = DRAWS) -> object:
    """Within five standard deviations of a binomial share."""
    return pytest.approx(share * count, abs=5 * np.sqrt(count * share * (1 - share)))


def test_flips_by_hand_and_about_half_of_the_time() -> None:
    none, across = [[0, 1, 2], [3, 4, 5]], [[2, 1, 0], [5, 4, 3]]
    down, both = [[3, 4, 5], [0, 1, 2]], [[5, 4, 3], [2, 1, 0]]
    counts = counted("flip", {"none": none, "across": across, "down": down, "both": both})
    assert counts == dict.fromkeys(counts, about(1 / 4))
    counts = counted("hflip", {"none": none, "across": across})
    assert counts == dict.fromkeys(counts, about(1 / 2))
    counts = counted("vflip", {"none": none, "down": down})
    assert counts == dict.fromkeys(counts, about(1 / 2))


def test_quarter_turns_by_hand_and_all_equally_often() -> None:
    rotations = {
        "0": [[0, 1, 2], [3, 4, 5]],
        "90": [[2, 5], [1, 4], [0, 3]],
        "180": [[5, 4, 3], [2, 1, 0]],
        "270": [[3, 0], [4, 1], [5, 2]],
    }
    counts = counted("rotate90", rotations)
    assert counts == dict.fromkeys(rotations, about(1 / 4))


def test_a_flip_twice_is_no_flip() -> None:
    source = crop()
    for key in keys(23):
        once = augmented(source, made("flip"), key)
        assert np.array_equal(augmented(once, made("flip"), key), source)


@pytest.mark.parametrize("fraction", [0.3, 0.7, 1.0])
def test_a_crop_keeps_its_area_and_aspect_and_lies_anywhere(fraction: float) -> None:
    h, w = 101, 151
    source = np.stack([*np.mgrid[:h, :w], np.zeros((h, w))]).astype(np.uint8)
    areas, places = [], []
    for result in many(f"crop:{fraction}", source):
        height, width = result.shape[1:]
        assert fraction * h * w <= height * width <= h * w
        assert abs(height - width * h / w) <= 1
        top, left = (int(v) for v in result[:2, 0, 0])
        assert np.array_equal(result, source[:, top : top + height, left : left + width])
        areas.append(height * width / (h * w))
        if height < h and width < w:
            places.append((top / (h - height), left / (w - width)))
    if fraction == 1:
        assert min(areas) == 1
        return
    assert np.mean(areas) == pytest.approx((1 + fraction) / 2, abs=0.03)
    assert min(areas) < fraction + 0.05
    assert np.mean(places, axis=0) == pytest.approx([0.5, 0.5], abs=0.08)


def test_a_turn_keeps_the_centre_and_fills_from_the_mirrored_crop() -> None:
    source = np.full((2, 31, 47), 90, np.uint8)
    source[1] = np.broadcast_to(np.arange(47), (31, 47)) * 5
    for result in many("rotate:180", source, 50):
        assert result.shape == source.shape
        assert (result[0] == 90).all()  # no black corners
        assert result[1, 15, 23] == pytest.approx(source[1, 15, 23], abs=3)
    angles = []
    for result in many("rotate:30", source):
        middle = result[1, 13:18, 21:26].astype(float)
        along_y, along_x = np.gradient(middle)
        angles.append(np.degrees(np.arctan2(along_y.mean(), along_x.mean())))
    assert np.abs(angles).max() == pytest.approx(30, abs=2)
    assert np.std(angles) == pytest.approx(30 / np.sqrt(3), rel=0.1)  # of a uniform draw
    assert np.mean(angles) == pytest.approx(0, abs=5)


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_moves_all_channels_alike(name: str) -> None:
    plane = crop(1)
    for result in many(name, np.repeat(plane, 5, axis=0), 23):
        assert np.array_equal(result, np.repeat(result[:1], 5, axis=0))


# --- values ------------------------------------------------------------------------------------


def test_noise_has_its_moments_and_is_another_in_every_pixel() -> None:
    source = np.full((3, 97, 101), 128, np.uint8)
    noise = augmented(source, made("noise:0.05"), KEY).astype(float) - 128
    assert noise.mean() == pytest.approx(0, abs=5 * 12.75 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(0.05 * 255, rel=0.02)
    assert np.abs(np.corrcoef(noise.reshape(3, -1)) - np.eye(3)).max() < 0.05
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.05


def test_noise_stops_at_black_and_white() -> None:
    for value in (0, 255):
        source = np.full((2, 61, 67), value, np.uint8)
        changed = np.abs(augmented(source, made("noise:0.05"), KEY).astype(int) - value)
        assert changed.mean() == pytest.approx(0.05 * 255 / np.sqrt(2 * np.pi), rel=0.1)


def test_brightness_multiplies_all_channels_by_one_factor() -> None:
    source = np.array([[[40]], [[100]], [[200]]], np.uint8)
    factors = []
    for result in many("brightness:0.5", source):
        factor = result[2, 0, 0] / 200
        expected = source[:2].ravel() * factor
        assert result[2, 0, 0] == 255 or result[:2].ravel() == pytest.approx(expected, abs=0.8)
        factors.append(result[1, 0, 0] / 100)
    assert 0.5 <= min(factors) < 0.52
    assert 1.48 < max(factors) <= 1.5
    assert np.mean(factors) == pytest.approx(1, abs=0.08)


def test_contrast_keeps_each_channels_mean() -> None:
    source = np.array([[[80, 120]], [[10, 30]]], np.uint8)  # means 100 and 20
    factors = []
    for result in many("contrast:0.5", source):
        assert result.mean(axis=(1, 2)) == pytest.approx([100, 20], abs=0.5)
        factor = (result[0, 0, 1] - 100) / 20
        assert result[1, 0, 1] - 20 == pytest.approx(10 * factor, abs=1)
        factors.append(factor)
    assert 0.5 <= min(factors) < 0.6
    assert 1.4 < max(factors) <= 1.5


def test_gamma_keeps_black_and_white_and_is_as_often_brighter_as_darker() -> None:
    source = np.array([[[0, 64, 255]]], np.uint8)
    powers = []
    for result in many("gamma:1", source):
        assert (result[0, 0, 0], result[0, 0, 2]) == (0, 255)
        powers.append(np.log(result[0, 0, 1] / 255) / np.log(64 / 255))
    assert 0.49 < min(powers) < 0.55
    assert 1.85 < max(powers) < 2.05
    assert np.mean(np.array(powers) > 1) == pytest.approx(0.5, abs=0.13)


def test_blur_keeps_the_mean_and_takes_from_the_variance() -> None:
    source = crop(3, 61, 67)
    ratios = []
    for result in many("blur:2", source, 60):
        assert result.mean() == pytest.approx(source.mean(), abs=1.5)
        ratios.append(result.std() / source.std())
    assert max(ratios) <= 1
    assert min(ratios) < 0.3


def test_grey_is_the_mean_over_all_channels_or_nothing() -> None:
    source = np.array([10, 20, 60, 70, 90], np.uint8).reshape(5, 1, 1)  # mean 50
    results = [result.ravel().tolist() for result in many("grey:0.3", source)]
    assert all(result in ([50] * 5, [10, 20, 60, 70, 90]) for result in results)
    assert results.count([50] * 5) == about(0.3)


@pytest.mark.parametrize("name", ["noise", "brightness", "contrast", "gamma", "blur", "rotate"])
def test_a_strength_of_nothing_changes_nothing(name: str) -> None:
    assert np.array_equal(augmented(crop(), made(f"{name}:0"), KEY), crop())


def test_steps_are_applied_in_their_order() -> None:
    source = np.array([10, 20, 60, 70, 90], np.uint8).reshape(5, 1, 1)
    first = augmented(source, made("grey:1,noise:0.2"), KEY)
    last = augmented(source, made("noise:0.2,grey:1"), KEY)
    assert len(np.unique(first)) > 1
    assert len(np.unique(last)) == 1


# --- settings ----------------------------------------------------------------------------------


def test_strengths_are_resolved_for_the_provenance() -> None:
    augmentation = made(" flip, crop,noise:.05 ,rotate:30", views=4, seed=9)
    assert augmentation.to_dict() == {
        "steps": ["flip", "crop:0.7", "noise:0.05", "rotate:30.0"],
        "views": 4,
        "seed": 9,
    }
    assert augmentation == Augmentation(("flip", "crop:0.7", "noise:0.05", "rotate:30"), 4, 9)
    assert augmentation.view_names == ("0", "1", "2", "3", "4")
    assert Augmentation.parse(None, 0, 9) is None


def test_every_default_is_allowed() -> None:
    for name, step in STEPS.items():
        strength = "" if step.default is None else f":{step.default!r}"
        assert made(name).steps == (name + strength,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flip:2", r"^augment: expected flip alone, got 'flip:2'; leave out the number"),
        ("crop:0", r"^augment: expected crop:F with F from 0\.01 to 1, got 'crop:0'; change it"),
        ("crop:1.5", r"got 'crop:1\.5'; change it, or write crop for 0\.7"),
        ("noise:-0.1", r"expected noise:F with F from 0 to 1, got 'noise:-0\.1'"),
        ("noise:much", r"expected noise:F with F from 0 to 1, got 'noise:much'"),
        ("noise:", r"expected noise:F with F from 0 to 1, got 'noise:'"),
        ("rotate:nan", r"expected rotate:F with F from 0 to 180, got 'rotate:nan'"),
        ("rotate:181", r"expected rotate:F with F from 0 to 180, got 'rotate:181'"),
        ("blur:inf", r"expected blur:F with F from 0 to 50, got 'blur:inf'"),
        (
            " , ",
            r"^augment: expected steps that make the views differ, got none; give `augment=flip",
        ),
    ],
)
def test_steps_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Augmentation.parse(text, 3, 0)


def test_unknown_steps_are_offered_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'flop'; did you mean flip, .*choose one of: blur"):
        Augmentation.parse("noise,flop", 3, 0)


def test_views_and_steps_go_together() -> None:
    with pytest.raises(
        InputError, match=r"^augment: expected steps .*got none; give `augment=flip"
    ):
        Augmentation.parse(None, 2, 0)
    with pytest.raises(InputError, match=r"^views: expected at least 1 with `augment`, got 0"):
        Augmentation.parse("flip", 0, 0)
    with pytest.raises(InputError, match=r"^seed: expected at least 0 with `augment`, got -1"):
        Augmentation.parse("flip", 1, -1)
