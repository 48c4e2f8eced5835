"""Decisions: the rules by which probabilities become label sets.

- A rule has a name (`RULES`); a `Decision` is a rule ready to be applied, with its thresholds.
- Thresholds are chosen once, on validation bags alone, and stay as they are for every other bag.
- Where probabilities are masked, those of labels that a bag cannot have are 0: neither a threshold
  of 0 nor top-K takes them.
- Multi-class bags have one class each: there only the default, the largest probability, applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dragn_cache.errors import InputError
from dragn_cache.scoring.arrays import require_probabilities, require_targets
from dragn_cache.scoring.rules import require_rule_for, top_count
from dragn_cache.types import Floats, Task, Warn

Decided = NDArray[np.int8]

HALF = 0.5
# Thresholds to choose from, as FRN does it: 0, 0.01, …, 0.99.
GRID: Floats = np.arange(100) / 100


@dataclass(frozen=True)
class Decision:
    """A rule, ready to be applied.

    Attributes:
        rule: ``default`` (multi-label with L >= 2: p >= min(0.5, max p of the bag), so that every
            bag has at least one label, though none whose p is 0; one label: p >= 0.5; multi-class:
            the largest p, the first if tied), ``half`` (p >= 0.5), ``thresholds`` (p >= the
            label's threshold), or ``top-K`` (the K largest p, earlier labels first if tied).
        thresholds: one for each label where the rule is ``thresholds``, else None.
        kept: numbers of the labels whose threshold stayed 0.5, as no validation bag has them.
    """

    rule: str = "default"
    thresholds: tuple[float, ...] | None = None
    kept: tuple[int, ...] = ()


DEFAULT = Decision()


def choose_decision(
    rule: str, task: Task, targets: ArrayLike, probabilities: ArrayLike
) -> Decision:
    """A rule made ready on validation bags.

    Args:
        rule: its name.
        task: ``"multilabel"`` or ``"multiclass"``.
        targets: (B, L) of 0 and 1, of the validation bags alone; only ``thresholds`` looks at them.
        probabilities: (B, L) of the same bags.

    Raises:
        InputError: there is no such rule, it does not fit the task, or the arrays are wrong.
    """
    p = require_probabilities(probabilities)
    require_rule_for(rule, task, p.shape[1])
    if rule != "thresholds":
        return Decision(rule)
    y = require_targets(targets, p.shape, task)
    thresholds = tuple(_best_threshold(y[:, k], p[:, k]) for k in range(p.shape[1]))
    return Decision(rule, thresholds, tuple(np.flatnonzero(~y.any(axis=0)).tolist()))


def _best_threshold(y: Floats, p: Floats) -> float:
    """The threshold of `GRID` with the highest F1 for targets and probabilities (B,) of a label.

    Of several with the same F1 the one nearest 0.5, of two as near the lower; so a label without
    positives, for which all are the same, keeps 0.5.
    """
    if not y.any():
        return HALF
    decided = (p >= GRID[:, None]) & (p > 0)  # (G, B)
    f1 = 2 * (decided @ y) / (decided.sum(axis=1) + y.sum())
    distance = np.abs(np.arange(len(GRID)) - len(GRID) // 2)  # whole numbers: ties are exact
    return float(GRID[np.lexsort((distance, -f1))[0]])


def decide(probabilities: ArrayLike, task: Task, decision: Decision = DEFAULT) -> Decided:
    """Turn probabilities into label sets.

    Args:
        probabilities: (B, L) floats in [0, 1].
        task: ``"multilabel"`` or ``"multiclass"``.
        decision: the rule.

    Returns:
        (B, L) int8 of 0 and 1.

    Raises:
        InputError: the shape, a value, the task or the rule is wrong, or the rule has thresholds
            for another number of labels.
    """
    p = require_probabilities(probabilities)
    if task not in ("multilabel", "multiclass"):
        raise InputError(
            "task",
            expected="'multilabel' or 'multiclass'",
            got=repr(task),
            remedy="correct the task",
        )
    require_rule_for(decision.rule, task, p.shape[1])
    count = 1 if task == "multiclass" else top_count(decision.rule)
    if count is not None:
        rank = np.argsort(np.argsort(-p, axis=1, kind="stable"), axis=1)
        largest: Decided = ((rank < count) & (p > 0)).astype(np.int8)
        return largest
    decided: Decided = ((p >= _limits(p, decision)) & (p > 0)).astype(np.int8)
    return decided


def _limits(p: Floats, decision: Decision) -> Floats:
    """The limits that probabilities (B, L) must reach, as an array that broadcasts to them."""
    if decision.rule == "thresholds":
        limits: Floats = np.array(decision.thresholds or ())
        if limits.shape != p.shape[1:]:
            raise InputError(
                "thresholds",
                expected=f"one for each of {p.shape[1]} labels",
                got=str(limits.size),
                remedy="choose them on validation bags first: choose_decision",
            )
        return limits
    if decision.rule == "half" or p.shape[1] == 1:
        return np.full(1, HALF)
    largest = p.max(axis=1, keepdims=True)
    return np.where(largest < HALF, largest, HALF)


def warn_kept_thresholds(decision: Decision, labels: Sequence[str], warn: Warn) -> None:
    """Report the labels for which no threshold could be chosen."""
    if decision.kept:
        names = ", ".join(labels[k] for k in decision.kept)
        warn(f"no validation bag has these labels, their thresholds stay 0.5: {names}")
