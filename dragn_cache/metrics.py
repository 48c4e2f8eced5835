"""Scores of predicted probabilities and of decisions by them, with bootstrap intervals over bags.

- Every score is computed from a weight per bag, for many weightings at once: weights of one give
  the score itself, the counts of a resample give one draw of the bootstrap.
- A score that is undefined is None, never 0 and never NaN; inside this module it is NaN.
- Bags are put into a canonical order first, so that nothing depends on the order they came in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dragn_cache.calibration import calibration_errors
from dragn_cache.decisions import (
    DEFAULT,
    Decision,
    checked_probabilities,
    checked_targets,
    decide,
)
from dragn_cache.errors import InputError
from dragn_cache.manifest import Task

Floats = NDArray[np.float64]

SCORES = (
    "auc_macro",
    "f1_macro",
    "f1_micro",
    "precision_macro",
    "recall_macro",
    "sensitivity",
    "specificity",
    "f1_samples",
    "auc_samples",
    "map",
    "accuracy",
    "precision_macro_reference",
    "brier",
)
COVERAGE_PERCENT = 95.0
MIN_RESAMPLES = 20
# Resamples are drawn in chunks of at most this many weights (8 MB), whatever the number of bags.
CHUNK_WEIGHTS = 1_000_000
EPSILON = float(np.finfo(np.float64).eps)


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
        ``map`` (mean average precision over the labels that have a positive),
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
    p = checked_probabilities(probabilities)
    y = checked_targets(targets, p.shape, task)
    if intervals < 0:
        raise InputError(
            "intervals",
            expected="a number of resamples >= 0",
            got=str(intervals),
            remedy="give 0 for no intervals, or 1000",
        )
    order = np.lexsort(np.hstack([y, p]).T)
    table = _Table.of(y[order], p[order], task, decision)
    bags = len(p)
    point, auc, precision = table.scores(np.ones((1, bags)))
    result: dict[str, Any] = {name: _or_none(point[name][0]) for name in SCORES}
    ece, ece_macro = calibration_errors(table.targets, table.probabilities, task)
    result["ece"], result["ece_macro"] = _or_none(ece), _or_none(ece_macro)
    result["labels_undefined"] = int(np.isnan(auc).sum())
    result["bags"] = bags
    result["average_precision"] = [_or_none(value) for value in precision[0]]
    result["auc"] = [_or_none(value) for value in auc[0]]
    result |= table.label_scores()
    result["decision"] = decision.rule
    result["thresholds"] = decision.thresholds and list(decision.thresholds)
    result["thresholds_kept"] = list(decision.kept)
    draws = [table.scores(weights)[0] for weights in _resamples(bags, intervals, seed)]
    result["intervals"] = {name: _interval([draw[name] for draw in draws]) for name in SCORES}
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
    seeds that test the same bags again do not narrow the interval. The percentiles are moved by the
    bootstrap's own bias, the mean of its draws less the score: in a test of few bags a resample
    loses the positives of rare labels, which then leave the mean over labels, and mAP rises.

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
        p = checked_probabilities(test.probabilities)
        y = checked_targets(test.targets, p.shape, task)
        tables.append(_Table.of(y, p, task, test.decision))

    def means(weights: Floats) -> dict[str, Floats]:
        scored = [
            table.scores(weights[:, test.rows])[0]
            for table, test in zip(tables, tests, strict=True)
        ]
        return {n: _mean_defined(np.stack([s[n] for s in scored], axis=1)) for n in SCORES}

    draws: dict[str, list[Floats]] = {name: [] for name in SCORES}
    for weights in _resamples(bags, intervals if tests else 0, seed):
        for name, drawn in means(weights).items():
            draws[name].append(drawn)
    if not tests:
        return dict.fromkeys(SCORES)
    point = means(np.ones((1, bags)))
    return {name: _centred(draws[name], point[name], name) for name in SCORES}


def _centred(draws: list[Floats], point: Floats, name: str) -> list[float] | None:
    """The draws' interval moved by what they lie beside the score, in the score's own range."""
    interval = _interval(draws)
    if interval is None:
        return None
    bias = np.nanmean(np.concatenate(draws)) - point[0]
    highest = 2 if name == "brier" else 1  # of classes it is a sum
    return [float(np.clip(end - bias, 0, highest)) for end in interval]


@dataclass(frozen=True)
class _Table:
    """All bags with their decisions, and the scores that a bag has by itself.

    Attributes:
        targets: (B, L) of 0 and 1.
        probabilities: (B, L).
        decided: (B, L) of 0 and 1.
        f1_of_bag: (B,) F1 over the bag's labels; NaN when L = 1.
        auc_of_bag: (B,) AUC over the bag's labels; NaN without both classes.
        brier_of_bag: (B,) mean over the bag's labels of (p - y)²; for classes the sum.
    """

    targets: Floats
    probabilities: Floats
    decided: Floats
    f1_of_bag: Floats
    auc_of_bag: Floats
    brier_of_bag: Floats

    @classmethod
    def of(cls, targets: Floats, probabilities: Floats, task: Task, decision: Decision) -> _Table:
        decided = decide(probabilities, task, decision).astype(np.float64)
        bags, labels = targets.shape
        squares = ((probabilities - targets) ** 2).sum(axis=1)
        both = 2 * (targets * decided).sum(axis=1)
        f1 = _ratio(both, targets.sum(axis=1) + decided.sum(axis=1), undefined=0.0)
        return cls(
            targets=targets,
            probabilities=probabilities,
            decided=decided,
            f1_of_bag=f1 if labels > 1 else np.full(bags, np.nan),
            auc_of_bag=_auc_of_bags(targets, probabilities),
            brier_of_bag=squares if task == "multiclass" else squares / labels,
        )

    def scores(self, weights: Floats) -> tuple[dict[str, Floats], Floats, Floats]:
        """Every score for R weightings of the bags.

        Args:
            weights: (R, B) counts.

        Returns:
            scores by name, each (R,); AUC and average precision of each label, each (R, L).
        """
        if not len(self.targets):
            undefined = np.full((len(weights), self.targets.shape[1]), np.nan)
            return dict.fromkeys(SCORES, undefined[:, 0]), undefined, undefined
        auc, precision = _rank_scores(self.targets, self.probabilities, weights)
        right = (self.targets == self.decided).all(axis=1).astype(np.float64)
        scores = self._decision_scores(weights) | {
            "auc_macro": _mean_defined(auc),
            "map": _mean_defined(precision),
            "f1_samples": _weighted_mean(self.f1_of_bag, weights),
            "auc_samples": _weighted_mean(self.auc_of_bag, weights),
            "accuracy": _weighted_mean(right, weights),
            "brier": _weighted_mean(self.brier_of_bag, weights),
        }
        return scores, auc, precision

    def _decision_scores(self, weights: Floats) -> dict[str, Floats]:
        """The scores that follow from counts of right and wrong decisions, each (R,)."""
        tp, fp, fn, tn = self._counts(weights)
        tp_sum, fp_sum, fn_sum, tn_sum = (count.sum(axis=1) for count in (tp, fp, fn, tn))
        return {
            "f1_macro": _ratio(2 * tp, 2 * tp + fp + fn, undefined=0.0).mean(axis=1),
            "f1_micro": _ratio(2 * tp_sum, 2 * tp_sum + fp_sum + fn_sum),
            "precision_macro": _ratio(tp, tp + fp, undefined=0.0).mean(axis=1),
            "recall_macro": _ratio(tp, tp + fn, undefined=0.0).mean(axis=1),
            "sensitivity": _ratio(tp_sum, tp_sum + fn_sum),
            "specificity": _ratio(tn_sum, tn_sum + fp_sum),
            "precision_macro_reference": ((tp + EPSILON) / (tp + fp + EPSILON)).mean(axis=1),
        }

    def label_scores(self) -> dict[str, list[float] | list[int]]:
        """Each label's F1, precision and recall, 0/0 counting as 0, and its number of positives."""
        tp, fp, fn, _ = (count[0] for count in self._counts(np.ones((1, len(self.targets)))))
        return {
            "f1": _ratio(2 * tp, 2 * tp + fp + fn, undefined=0.0).tolist(),
            "precision": _ratio(tp, tp + fp, undefined=0.0).tolist(),
            "recall": _ratio(tp, tp + fn, undefined=0.0).tolist(),
            "positives": (tp + fn).astype(int).tolist(),
        }

    def _counts(self, weights: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """True and false positives, false and true negatives of each label, each (R, L)."""
        tp = weights @ (self.targets * self.decided)
        fp = weights @ ((1 - self.targets) * self.decided)
        fn = weights @ (self.targets * (1 - self.decided))
        tn = weights @ ((1 - self.targets) * (1 - self.decided))
        return tp, fp, fn, tn


def _rank_scores(targets: Floats, scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """AUC and average precision of L columns of n rows, for R weightings of the rows.

    Args:
        targets: (n, L) of 0 and 1.
        scores: (n, L).
        weights: (R, n) counts.

    Returns:
        AUC (R, L), NaN where a column has one class only; average precision (R, L), NaN where it
        has no positive.
    """
    shape = (len(weights), targets.shape[1])
    auc, precision = np.full(shape, np.nan), np.full(shape, np.nan)
    by_row = np.ascontiguousarray(weights.T)  # (n, R): sorting rows then moves whole lines
    for label in range(shape[1]):
        order = np.argsort(-scores[:, label])
        ranked = by_row[order]
        is_positive = targets[order, label, None]
        positive, negative = ranked * is_positive, ranked * (1 - is_positive)
        first_of_tie = np.flatnonzero(np.diff(scores[order, label], prepend=np.nan) != 0)
        if len(first_of_tie) < len(order):
            positive = np.add.reduceat(positive, first_of_tie, axis=0)
            negative = np.add.reduceat(negative, first_of_tie, axis=0)
        # Rows are thresholds, highest first; the sums count what lies at or above each.
        found, alarms = positive.cumsum(axis=0), negative.cumsum(axis=0)
        beaten = np.einsum("tr,tr->r", found - positive / 2, negative)
        auc[:, label] = _ratio(beaten, found[-1] * alarms[-1])
        gained = np.einsum("tr,tr->r", positive, _ratio(found, found + alarms, undefined=0.0))
        precision[:, label] = _ratio(gained, found[-1])
    return auc, precision


def _auc_of_bags(targets: Floats, scores: Floats) -> Floats:
    """AUC (B,) of each bag over its labels: pairs won of targets and scores (B, L)."""
    won = np.zeros(len(targets))
    for label in range(targets.shape[1]):
        score = scores[:, label, None]
        beaten = (1 - targets) * ((score > scores) + (score == scores) / 2)
        won += targets[:, label] * beaten.sum(axis=1)
    return _ratio(won, targets.sum(axis=1) * (1 - targets).sum(axis=1))


def _resamples(bags: int, count: int, seed: int) -> Iterator[Floats]:
    """Chunks (R, B) of how often each bag is in a resample of B bags drawn with replacement."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_WEIGHTS // max(1, bags))
    for start in range(0, count if bags else 0, chunk):
        rows = min(chunk, count - start)
        drawn = rng.integers(bags, size=(rows, bags)) + bags * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * bags)
        yield counts.reshape(rows, bags).astype(np.float64)


def _interval(draws: list[Floats]) -> list[float] | None:
    values = np.concatenate(draws) if draws else np.empty(0)
    defined = values[~np.isnan(values)]
    if len(defined) < MIN_RESAMPLES:
        return None
    tail = (100 - COVERAGE_PERCENT) / 2
    return [float(value) for value in np.percentile(defined, [tail, 100 - tail])]


def _ratio(numerator: Floats, denominator: Floats, *, undefined: float = np.nan) -> Floats:
    """numerator / denominator, ``undefined`` where the denominator is 0."""
    ratio: Floats = np.full(denominator.shape, undefined)
    np.divide(numerator, denominator, out=ratio, where=denominator > 0)
    return ratio


def _mean_defined(values: Floats) -> Floats:
    """Mean (R,) over the columns of values (R, L) that are not NaN."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=1), defined.sum(axis=1, dtype=np.float64))


def _weighted_mean(of_bag: Floats, weights: Floats) -> Floats:
    """Mean (R,) of a score of each bag (B,) over the bags where it is not NaN."""
    defined = ~np.isnan(of_bag)
    return _ratio(weights[:, defined] @ of_bag[defined], weights[:, defined].sum(axis=1))


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
