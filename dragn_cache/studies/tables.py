"""Tables of a cross-validation: scores of each fold, their means, paired comparisons.

- Rows are dictionaries by column; a score that is undefined is None, an empty cell in the file.
- Means and deviations are over the tests, seeds times folds, in which a score is defined.
- Tests overlap in their training bags, so their scores are not independent: a comparison widens the
  variance of the mean difference as Nadeau and Bengio do ("Inference for the generalization
  error", Machine Learning 52, 2003, section 3.4, the corrected resampled t-test); for the tests of
  repeated cross-validation as Bouckaert and Frank (PAKDD 2004) apply it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dragn_cache.scoring.comparison import corrected_t_test, mean_and_sd
from dragn_cache.scoring.decisions import choose_decision, warn_kept_thresholds
from dragn_cache.scoring.metrics import ScoredBags, evaluate, mean_intervals
from dragn_cache.scoring.scores import ACCURACY, AUC_MACRO, COMPARED_SCORES, SCORES
from dragn_cache.types import Task

ResultRow = dict[str, Any]
Place = tuple[str, int, int]
"""A method's label, a seed, a fold."""

FIRST_SCORES = (ACCURACY, AUC_MACRO)
SCORE_COLUMNS = tuple(
    score.name for score in (*FIRST_SCORES, *(s for s in SCORES if s not in FIRST_SCORES))
)
ENDS = ("low", "high")
COMPARISON = (
    "first",
    "second",
    "score",
    "tests",
    "difference_mean",
    "difference_sd",
    "difference_low",
    "difference_high",
    "p",
)


@dataclass(frozen=True)
class Training:
    """One training's place in the cross-validation, and its outcome.

    Attributes:
        aggregator: its label.
        seed, fold: which division into folds, and which of them was the test.
        probabilities: (n, L) of the test bags, in the order of their numbers; empty after an error.
        validation: (m, L) of the validation bags likewise, to choose thresholds by.
        best_epoch: the one that validation chose; None without epochs.
        parameters: number of values that the model has learned.
        seconds: of training.
        error: why there is no model; empty if there is one.
        notes: what did not go as usual.
    """

    aggregator: str
    seed: int
    fold: int
    probabilities: tuple[tuple[float, ...], ...] = ()
    validation: tuple[tuple[float, ...], ...] = ()
    best_epoch: int | None = None
    parameters: int = 0
    seconds: float = 0.0
    error: str = ""
    notes: tuple[str, ...] = ()

    @property
    def task(self) -> Place:
        """Its place."""
        return self.aggregator, self.seed, self.fold


@dataclass(frozen=True)
class Truth:
    """The truth that trainings are scored by: targets, folds, and the rule of decision.

    Attributes:
        targets: (B, L) of 0 and 1.
        labels: their names.
        task: ``multilabel`` or ``multiclass``.
        rule: by which probabilities become label sets, see `Decision`.
        folds: (S, B), each bag's fold for each seed.
        count: K, how many folds there are.
    """

    targets: NDArray[np.int8]
    labels: tuple[str, ...]
    task: Task
    rule: str
    folds: NDArray[np.int64]
    count: int

    def splits(self, seed: int, fold: int) -> NDArray[np.str_]:
        """(B,) names: this fold is the test, the next one validation, the rest training."""
        places = (self.folds[seed] - fold) % self.count
        return np.where(places == 0, "test", np.where(places == 1, "validation", "train"))

    def tested(self, training: Training) -> ScoredBags:
        """A training's test bags, their probabilities, and the rule made ready on validation."""
        splits = self.splits(training.seed, training.fold)
        rows, chosen = np.flatnonzero(splits == "test"), np.flatnonzero(splits == "validation")
        decision = choose_decision(
            self.rule, self.task, self.targets[chosen], np.array(training.validation)
        )
        return ScoredBags(rows, self.targets[rows], np.array(training.probabilities), decision)


def fold_row(training: Training, truth: Truth) -> ResultRow:
    """One row of folds.csv."""
    names, counts = np.unique(truth.splits(training.seed, training.fold), return_counts=True)
    bags = dict(zip(names.tolist(), counts.tolist(), strict=True))
    done = not training.error
    notes, scores = list(training.notes), dict[str, Any]()
    if done:
        tested = truth.tested(training)
        scores = _scores(tested, truth.task)
        warn_kept_thresholds(tested.decision, truth.labels, notes.append)
    return {
        "aggregator": training.aggregator,
        "seed": training.seed,
        "fold": training.fold,
        **{f"{split}_bags": bags[split] for split in ("train", "validation", "test")},
        "best_epoch": training.best_epoch,
        **{name: scores.get(name) for name in SCORE_COLUMNS},
        "labels_undefined": scores.get("labels_undefined"),
        "seconds": round(training.seconds, 3) if done else None,
        "error": training.error,
        "notes": "; ".join(notes),
    }


def _scores(test: ScoredBags, task: Task) -> dict[str, Any]:
    return evaluate(
        test.targets, test.probabilities, task=task, decision=test.decision, intervals=0
    )


def summary_row(
    trainings: Sequence[Training], rows: Sequence[ResultRow], truth: Truth, intervals: int
) -> ResultRow:
    """One row of summary.csv: an aggregator's trainings, and their rows of folds.csv.

    Args:
        intervals: bootstrap resamples over bags; 0 for no intervals.
    """
    done = [training for training in trainings if not training.error]
    tests = [truth.tested(training) for training in done]
    bounds = mean_intervals(tests, len(truth.targets), task=truth.task, intervals=intervals)
    row: ResultRow = {"aggregator": trainings[0].aggregator}
    for name in SCORE_COLUMNS:
        row[f"{name}_mean"], row[f"{name}_sd"] = mean_and_sd(r[name] for r in rows)
    for name in SCORE_COLUMNS:
        for end, value in zip(ENDS, bounds[name] or (None, None), strict=True):
            row[f"{name}_{end}"] = value
    row["trainings"], row["failed"] = len(done), len(trainings) - len(done)
    # Of the fold with the most: a codebook, say, may have fewer entries where bags are few.
    row["parameters"] = max((training.parameters for training in done), default=None)
    row["seconds_mean"] = mean_and_sd(r["seconds"] for r in rows)[0]
    return row


def comparison_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows of comparison.csv: every two aggregators, in each of `COMPARED_SCORES`.

    Args:
        rows: those of folds.csv.
    """
    by_method: dict[str, dict[tuple[int, int], ResultRow]] = {}
    for row in rows:
        by_method.setdefault(row["aggregator"], {})[row["seed"], row["fold"]] = row
    return [
        _compared(first, second, by_method, score.name)
        for first, second in combinations(by_method, 2)
        for score in COMPARED_SCORES
    ]


def _compared(
    first: str,
    second: str,
    by_method: Mapping[str, Mapping[tuple[int, int], ResultRow]],
    score: str,
) -> ResultRow:
    pairs = [(row, by_method[second][place]) for place, row in by_method[first].items()]
    pairs = [(a, b) for a, b in pairs if a[score] is not None and b[score] is not None]
    differences = np.array([a[score] - b[score] for a, b in pairs])
    ratios = [a["test_bags"] / a["train_bags"] for a, _ in pairs]
    mean, sd = mean_and_sd(differences.tolist())
    low, high, p = corrected_t_test(differences, float(np.mean(ratios)) if ratios else 0.0)
    values = (first, second, score, len(pairs), mean, sd, low, high, p)
    return dict(zip(COMPARISON, values, strict=True))
