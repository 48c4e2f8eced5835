"""All scores of many weightings of the bags at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dragn_cache.scoring.decisions import Decision, decide
from dragn_cache.scoring.scores import (
    ACCURACY,
    AUC_MACRO,
    AUC_SAMPLES,
    BRIER,
    F1_MACRO,
    F1_MICRO,
    F1_SAMPLES,
    MAP,
    PRECISION_MACRO,
    PRECISION_MACRO_REFERENCE,
    RECALL_MACRO,
    SCORES,
    SENSITIVITY,
    SPECIFICITY,
    Score,
)
from dragn_cache.types import Floats, Task

EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class ScoreTable:
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
    def of(
        cls, targets: Floats, probabilities: Floats, task: Task, decision: Decision
    ) -> ScoreTable:
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

    def scores(self, weights: Floats) -> tuple[dict[Score, Floats], Floats, Floats]:
        """Every score for R weightings of the bags.

        Args:
            weights: (R, B) counts.

        Returns:
            the scores, each (R,); AUC and average precision of each label, each (R, L).
        """
        if not len(self.targets):
            undefined = np.full((len(weights), self.targets.shape[1]), np.nan)
            return dict.fromkeys(SCORES, undefined[:, 0]), undefined, undefined
        auc, average_precision = _rank_scores(self.targets, self.probabilities, weights)
        exact = (self.targets == self.decided).all(axis=1).astype(np.float64)
        scores = self._decision_scores(weights) | {
            AUC_MACRO: mean_defined(auc),
            MAP: mean_defined(average_precision),
            F1_SAMPLES: _weighted_mean(self.f1_of_bag, weights),
            AUC_SAMPLES: _weighted_mean(self.auc_of_bag, weights),
            ACCURACY: _weighted_mean(exact, weights),
            BRIER: _weighted_mean(self.brier_of_bag, weights),
        }
        return scores, auc, average_precision

    def _decision_scores(self, weights: Floats) -> dict[Score, Floats]:
        """The scores that follow from counts of right and wrong decisions, each (R,)."""
        tp, fp, fn, tn = self._counts(weights)
        tp_sum, fp_sum, fn_sum, tn_sum = (count.sum(axis=1) for count in (tp, fp, fn, tn))
        return {
            F1_MACRO: _ratio(2 * tp, 2 * tp + fp + fn, undefined=0.0).mean(axis=1),
            F1_MICRO: _ratio(2 * tp_sum, 2 * tp_sum + fp_sum + fn_sum),
            PRECISION_MACRO: _ratio(tp, tp + fp, undefined=0.0).mean(axis=1),
            RECALL_MACRO: _ratio(tp, tp + fn, undefined=0.0).mean(axis=1),
            SENSITIVITY: _ratio(tp_sum, tp_sum + fn_sum),
            SPECIFICITY: _ratio(tn_sum, tn_sum + fp_sum),
            PRECISION_MACRO_REFERENCE: ((tp + EPSILON) / (tp + fp + EPSILON)).mean(axis=1),
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
        AUC and average precision, each (R, L), NaN where a column has one class only: where all
        are positive, every ranking has an average precision of 1.
    """
    shape = (len(weights), targets.shape[1])
    auc, average_precision = np.full(shape, np.nan), np.full(shape, np.nan)
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
        true_positives, false_positives = positive.cumsum(axis=0), negative.cumsum(axis=0)
        concordant = np.einsum("tr,tr->r", true_positives - positive / 2, negative)
        auc[:, label] = _ratio(concordant, true_positives[-1] * false_positives[-1])
        precisions = _ratio(true_positives, true_positives + false_positives, undefined=0.0)
        precision_gain = np.einsum("tr,tr->r", positive, precisions)
        both = true_positives[-1] * np.sign(false_positives[-1])
        average_precision[:, label] = _ratio(precision_gain, both)
    return auc, average_precision


def _auc_of_bags(targets: Floats, scores: Floats) -> Floats:
    """AUC (B,) of each bag over its labels: its share of concordant pairs, from arrays (B, L)."""
    concordant = np.zeros(len(targets))
    for label in range(targets.shape[1]):
        score = scores[:, label, None]
        below = (1 - targets) * ((score > scores) + (score == scores) / 2)
        concordant += targets[:, label] * below.sum(axis=1)
    return _ratio(concordant, targets.sum(axis=1) * (1 - targets).sum(axis=1))


def _ratio(numerator: Floats, denominator: Floats, *, undefined: float = np.nan) -> Floats:
    """numerator / denominator, ``undefined`` where the denominator is 0."""
    ratio: Floats = np.full(denominator.shape, undefined)
    np.divide(numerator, denominator, out=ratio, where=denominator > 0)
    return ratio


def mean_defined(values: Floats) -> Floats:
    """Mean (R,) over the columns of values (R, L) that are not NaN."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=1), defined.sum(axis=1, dtype=np.float64))


def _weighted_mean(of_bag: Floats, weights: Floats) -> Floats:
    """Mean (R,) of a score of each bag (B,) over the bags where it is not NaN."""
    defined = ~np.isnan(of_bag)
    return _ratio(weights[:, defined] @ of_bag[defined], weights[:, defined].sum(axis=1))
