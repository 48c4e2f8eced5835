"""Calibration: whether probabilities can be believed; expected error and reliability diagram.

- Expected calibration error as Naeini et al. (AAAI 2015) and Guo et al. (ICML 2017) have it: 15
  bins of equal width, of each the mean probability against the share that is true.
- Bins are open below and closed above, as (0, 1/15]; the first holds 0 too.
- The error has no bootstrap interval. Chance alone makes gaps in bins of few bags, so it is above 0
  even for perfect probabilities; a resample widens every gap: measured on 3000 bags, the percentile
  interval lay wholly above the error. Use it to compare models on the same bags.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dragn_cache.scoring.arrays import require_probabilities, require_targets
from dragn_cache.types import Floats, Ints, Task

BINS = 15
EDGES: Floats = np.arange(BINS + 1) / BINS


@dataclass(frozen=True)
class Reliability:
    """The numbers of a reliability diagram, bin by bin.

    Attributes:
        counts: (15,) int64, probabilities in each bin.
        confidence: (15,) their mean; NaN in an empty bin.
        frequency: (15,) the share of them that is true; NaN in an empty bin.
    """

    counts: Ints
    confidence: Floats
    frequency: Floats

    @property
    def error(self) -> float:
        """The gaps between frequency and confidence, averaged by count."""
        filled = self.counts > 0
        gaps = np.abs(self.frequency - self.confidence)[filled]
        return float(np.average(gaps, weights=self.counts[filled]))


def reliability(targets: ArrayLike, probabilities: ArrayLike, task: Task) -> Reliability:
    """Confidence and frequency of each bin.

    Args:
        targets: (B, L) of 0 and 1; one-hot when the task is multi-class.
        probabilities: (B, L) floats in [0, 1].
        task: multi-label: all (bag, label) pairs; multi-class: each bag's largest probability.

    Raises:
        InputError: shapes or values are wrong.
    """
    p = require_probabilities(probabilities)
    y = require_targets(targets, p.shape, task)
    if task == "multiclass":
        y, p = _top(y, p)
    y, p = y.ravel(), p.ravel()
    bins = _bins(p)
    counts = np.bincount(bins, minlength=BINS)
    means = np.full((2, BINS), np.nan)
    filled = counts > 0
    for mean, values in zip(means, (p, y), strict=True):
        total = np.bincount(bins, weights=values, minlength=BINS)
        mean[filled] = total[filled] / counts[filled]
    return Reliability(counts, means[0], means[1])


def calibration_errors(
    targets: ArrayLike, probabilities: ArrayLike, task: Task
) -> tuple[float, float]:
    """Expected calibration error over all bags, and the mean of the labels' own.

    Args:
        targets: (B, L) of 0 and 1; one-hot when the task is multi-class.
        probabilities: (B, L) floats in [0, 1].
        task: ``"multilabel"`` or ``"multiclass"``.

    Returns:
        the error over all (bag, label) pairs, or for classes over each bag's largest probability;
        the mean over labels of each one's error, for classes one against rest; NaN without bags.

    Raises:
        InputError: shapes or values are wrong.
    """
    p = require_probabilities(probabilities)
    y = require_targets(targets, p.shape, task)
    if not len(p):
        return float("nan"), float("nan")
    labels = range(p.shape[1])
    of_labels = [reliability(y[:, [k]], p[:, [k]], "multilabel").error for k in labels]
    return reliability(y, p, task).error, float(np.mean(of_labels))


def _bins(p: Floats) -> Ints:
    """The bin of each probability, 0 to 14."""
    return np.searchsorted(EDGES[1:-1], p, side="left").astype(np.int64)


def _top(targets: Floats, probabilities: Floats) -> tuple[Floats, Floats]:
    """(B, 1) whether each bag's most probable class is true, and (B, 1) that probability."""
    best = probabilities.argmax(axis=1)[:, None]
    return np.take_along_axis(targets, best, 1), np.take_along_axis(probabilities, best, 1)
