"""Calibration: errors by hand and against plain arithmetic, bins, and the reliability diagram."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dragn_cache.errors import InputError
from dragn_cache.figures.reliability import plot_reliability
from dragn_cache.scoring.calibration import BINS, calibration_errors, reliability
from dragn_cache.scoring.metrics import evaluate


def plain_error(y: np.ndarray, p: np.ndarray) -> float:
    """Σ |B_m| / n · |share true − mean p|, bin (m/15, (m + 1)/15], over flat arrays."""
    total = 0.0
    for m in range(15):
        inside = (p > m / 15) & (p <= (m + 1) / 15) | ((m == 0) & (p == 0))
        if inside.any():
            total += inside.sum() / len(p) * abs(y[inside].mean() - p[inside].mean())
    return total


def test_errors_by_hand() -> None:
    # Bins (0.6, 0.6667] and (0.2, 0.2667]; label 1's gaps have another sign than label 0's.
    y = np.array([[1, 0], [0, 0], [1, 1]])
    p = np.array([[0.65, 0.65], [0.25, 0.21], [0.65, 0.25]])
    first = (2 * abs(1 - 0.65) + 1 * abs(0 - 0.25)) / 3
    second = (1 * 0.65 + 2 * abs(0.5 - 0.23)) / 3
    pooled = (3 * abs(2 / 3 - 0.65) + 3 * abs(1 / 3 - 0.71 / 3)) / 6
    assert calibration_errors(y, p, "multilabel") == pytest.approx((pooled, (first + second) / 2))


def test_classes_by_hand() -> None:
    y = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    p = np.array([[0.7, 0.2, 0.1], [0.72, 0.18, 0.1], [0.1, 0.35, 0.55]])
    top = (2 * abs(1 / 2 - 0.71) + abs(1 - 0.55)) / 3
    assert calibration_errors(y, p, "multiclass")[0] == pytest.approx(top)
    brier = (0.14 + (0.72**2 + 0.82**2 + 0.01) + (0.01 + 0.35**2 + 0.45**2)) / 3
    assert evaluate(y, p, task="multiclass", intervals=0)["brier"] == pytest.approx(brier)


@pytest.mark.parametrize("decimals", [17, 1], ids=["distinct", "on edges"])
def test_errors_agree_with_plain_arithmetic(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    p = rng.random((307, 7)).round(decimals)
    y = (rng.random((307, 7)) < p**2).astype(int)
    pooled, macro = calibration_errors(y, p, "multilabel")
    assert pooled == pytest.approx(plain_error(y.ravel(), p.ravel()))
    assert macro == pytest.approx(np.mean([plain_error(y[:, k], p[:, k]) for k in range(7)]))
    p = rng.random((307, 5))
    p /= p.sum(1, keepdims=True)
    y = np.eye(5, dtype=int)[rng.integers(5, size=307)]
    top, macro = calibration_errors(y, p, "multiclass")
    right = (y.argmax(1) == p.argmax(1)).astype(int)
    assert top == pytest.approx(plain_error(right, p.max(1)))
    assert macro == pytest.approx(np.mean([plain_error(y[:, k], p[:, k]) for k in range(5)]))


def test_bins_are_closed_above_and_the_first_below_too() -> None:
    p = np.array([[0.0], [1 / 15], [np.nextafter(1 / 15, 1)], [2 / 15], [14 / 15], [1.0]])
    counts = reliability(np.ones((6, 1)), p, "multilabel").counts
    assert counts.tolist() == [2, 2, *[0] * 11, 1, 1]
    assert len(counts) == BINS


def test_the_diagrams_numbers() -> None:
    y, p = [[1], [0], [1], [1]], [[0.91], [0.93], [0.92], [0.3]]
    found = reliability(y, p, "multilabel")
    assert found.counts[[4, 13]].tolist() == [1, 3]
    assert found.confidence[[4, 13]] == pytest.approx([0.3, 0.92])
    assert found.frequency[[4, 13]] == pytest.approx([1, 2 / 3])
    assert np.isnan(found.frequency[0])
    assert found.error == pytest.approx((0.7 + 3 * (0.92 - 2 / 3)) / 4)


def test_right_probabilities_have_a_small_error_and_certain_ones_none() -> None:
    rng = np.random.default_rng(3)
    p = rng.random((4001, 5))
    y = (rng.random((4001, 5)) < p).astype(int)
    assert calibration_errors(y, p, "multilabel")[0] < 0.015
    assert calibration_errors(y, p**3, "multilabel")[0] > 0.2
    assert calibration_errors(y, y.astype(float), "multilabel") == (0, 0)
    result = evaluate(y, p, task="multilabel", intervals=0)
    assert result["brier"] == pytest.approx(((p - y) ** 2).mean())
    assert result["ece"] == pytest.approx(calibration_errors(y, p, "multilabel")[0])


def test_without_bags_there_is_no_error() -> None:
    result = evaluate(np.zeros((0, 3), int), np.zeros((0, 3)), task="multilabel")
    assert result["ece"] is result["ece_macro"] is result["brier"] is None
    with pytest.raises(InputError, match="give probabilities, not logits"):
        reliability([[1]], [[1.5]], "multilabel")


def test_the_diagram_is_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    p = rng.random((97, 3)) * 0.6  # bins without probabilities
    found = reliability((rng.random((97, 3)) < p).astype(int), p, "multilabel")
    plot_reliability(tmp_path / "c.png", found, "run, test: 97 bags, 3 labels")
    with Image.open(tmp_path / "c.png") as image:
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 20
    assert [0x33, 0x65, 0x8A] in colours.tolist()
