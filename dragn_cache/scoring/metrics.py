"""Scores of predicted probabilities and of decisions by them, with bootstrap intervals over bags.

- Every score is computed from a weight per bag, for many weightings at once: weights of one give
  the score itself, the counts of a resample give one draw of the bootstrap.
- A score that is undefined is None, never 0 and never NaN; inside this module it is NaN.
- Bags are put into a canonical order first, so that nothing depends on the order they came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dragn_cache.errors import InputError
from dragn_cache.scoring.arrays import require_probabilities, require_targets
from dragn_cache.scoring.calibration import calibration_errors
from dragn_cache.scoring.decisions import DEFAULT, Decision
from dragn_cache.scoring.intervals import bootstrap_counts, bootstrap_interval
from dragn_cache.scoring.score_table import ScoreTable, mean_defined
from dragn_cache.scoring.scores import ECE, ECE_MACRO, SCORES, Score
from dragn_cache.types import Floats, Task


def evaluate(
    targets: ArrayLike,
    probabilities: ArrayLike,
    *,
    task: Task,
    decision: Decision = DEFAULT,
    intervals: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score probabilities against the truth; everything returned can be written as JSON.

    AUC is the Mann-Whitney statistic, a tie counting half; average precision is the sum over
    thresholds of precision times the gain in recall (both as scikit-learn has them). Macro F1,
    precision and recall average over all labels and count 0/0 as 0, scikit-learn's
    ``zero_division=0``.

    Args:
        targets: (B, L) of 0 and 1; one-hot when the task is multi-class.
        probabilities: (B, L) floats in [0, 1].
        task: ``"multilabel"`` or ``"multiclass"``.
        decision: how `decide` decides; its thresholds stay as they are in every resample.
        intervals: number of bootstrap resamples over bags; 0 for none.
        seed: seed of the bootstrap.

    Returns:
        One float, or None where undefined, for each of
        ``auc_macro`` (mean over the labels that have both classes; multi-class: one against rest),
        ``f1_macro, f1_micro, precision_macro, recall_macro``,
        ``sensitivity`` (micro recall), ``specificity`` (micro TN / (TN + FP)),
        ``f1_samples`` (mean over bags; None when L = 1, where it says nothing),
        ``auc_samples`` (mean over the bags that have both classes among their labels),
        ``map`` (mean average precision over the labels that have both classes: where all bags have
        a label, every ranking has 1),
        ``accuracy`` (share of bags whose whole label set is right), and
        ``precision_macro_reference``, DRAGN's convention (TP + ε) / (TP + FP + ε), by which a
        label that is never predicted scores 1;
        ``brier`` (mean of (p - y)² over all bags and labels; for classes the mean over bags of its
        sum); ``ece, ece_macro``, without intervals, see `calibration_errors`; then
        ``labels_undefined`` (labels with one class only) and ``bags``, both int;
        ``average_precision`` and ``auc``, lists of L floats or None; ``f1, precision, recall``
        and ``positives``, lists of L numbers;
        ``decision`` (the rule's name), ``thresholds`` (L floats, None for other rules) and
        ``thresholds_kept``, see `Decision`; and
        ``intervals``: for each score ``[low, high]``, the 95 % percentile bootstrap over bags.
        Resamples in which a score is undefined are left out; below 20 its interval is None.

    Raises:
        InputError: shapes, values, the task or ``intervals`` are wrong.
    """
    p = require_probabilities(probabilities)
    y = require_targets(targets, p.shape, task)
    if intervals < 0:
        raise InputError(
            "intervals",
            expected="a number of resamples >= 0",
            got=str(intervals),
            remedy="give 0 for no intervals, or 1000",
        )
    order = np.lexsort(np.hstack([y, p]).T)
    table = ScoreTable.of(y[order], p[order], task, decision)
    bags = len(p)
    point, auc, average_precision = table.scores(np.ones((1, bags)))
    result: dict[str, Any] = {s.name: _or_none(point[s][0]) for s in SCORES}
    ece, ece_macro = calibration_errors(table.targets, table.probabilities, task)
    result[ECE.name], result[ECE_MACRO.name] = _or_none(ece), _or_none(ece_macro)
    result["labels_undefined"] = int(np.isnan(auc).sum())
    result["bags"] = bags
    result["average_precision"] = [_or_none(value) for value in average_precision[0]]
    result["auc"] = [_or_none(value) for value in auc[0]]
    result |= table.label_scores()
    result["decision"] = decision.rule
    result["thresholds"] = decision.thresholds and list(decision.thresholds)
    result["thresholds_kept"] = list(decision.kept)
    draws = [table.scores(weights)[0] for weights in bootstrap_counts(bags, intervals, seed)]
    result["intervals"] = {s.name: bootstrap_interval([draw[s] for draw in draws]) for s in SCORES}
    return result


@dataclass(frozen=True)
class ScoredBags:
    """The n of B bags that one model was tested on.

    Attributes:
        rows: (n,) their numbers, 0 to B - 1.
        targets: (n, L) of 0 and 1.
        probabilities: (n, L).
        decision: how `decide` decides.
    """

    rows: NDArray[np.int64]
    targets: NDArray[Any]
    probabilities: NDArray[np.float64]
    decision: Decision = DEFAULT


def mean_intervals(
    tests: Sequence[ScoredBags], bags: int, *, task: Task, intervals: int = 1000, seed: int = 0
) -> dict[str, list[float] | None]:
    """95 % bootstrap intervals of scores that are means over several tests.

    Bags are resampled, not tests: in one draw a bag has the same weight in every test, so that
    seeds that test the same bags again do not narrow the interval. The bootstrap's bias, the mean
    of its draws less the score, is subtracted: in a test of few bags a resample loses the positives
    of rare labels, which then leave the mean over labels, and mAP rises.

    Args:
        tests: for example the test folds of a repeated cross-validation.
        bags: B, how many bags there are.
        task: ``"multilabel"`` or ``"multiclass"``.
        intervals: number of resamples; 0 for none.
        seed: seed of the bootstrap.

    Returns:
        for each score ``[low, high]`` of its mean over the tests where it is defined; None where
        fewer than 20 resamples define it.

    Raises:
        InputError: a shape, a value or the task is wrong.
    """
    tables = []
    for test in tests:
        p = require_probabilities(test.probabilities)
        y = require_targets(test.targets, p.shape, task)
        tables.append(ScoreTable.of(y, p, task, test.decision))

    def means(weights: Floats) -> dict[Score, Floats]:
        scored = [
            table.scores(weights[:, test.rows])[0]
            for table, test in zip(tables, tests, strict=True)
        ]
        return {s: mean_defined(np.stack([own[s] for own in scored], axis=1)) for s in SCORES}

    draws: dict[Score, list[Floats]] = {score: [] for score in SCORES}
    for weights in bootstrap_counts(bags, intervals if tests else 0, seed):
        for score, drawn in means(weights).items():
            draws[score].append(drawn)
    if not tests:
        return dict.fromkeys(score.name for score in SCORES)
    point = means(np.ones((1, bags)))
    return {s.name: _centred(draws[s], point[s], s.highest) for s in SCORES}


def _centred(draws: list[Floats], point: Floats, highest: float) -> list[float] | None:
    """The draws' interval less their bias against the score, clipped to the score's range."""
    interval = bootstrap_interval(draws)
    if interval is None:
        return None
    bias = np.nanmean(np.concatenate(draws)) - point[0]
    return [float(np.clip(end - bias, 0, highest)) for end in interval]


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
