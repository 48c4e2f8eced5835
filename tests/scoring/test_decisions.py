"""Decisions: every rule by hand, thresholds from validation bags alone, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from dragn_cache.errors import InputError
from dragn_cache.scoring.decisions import GRID, Decision, choose_decision, decide
from dragn_cache.scoring.metrics import evaluate
from dragn_cache.scoring.score_table import ScoreTable
from dragn_cache.scoring.scores import F1_MICRO
from dragn_cache.training.config import TrainConfig

P = [[0.9, 0.2, 0.1], [0.6, 0.7, 0.2], [0.4, 0.3, 0.1], [0.1, 0.3, 0.2], [0.2, 0.1, 0.4]]


def by(rule: str) -> list[list[int]]:
    decided: list[list[int]] = decide(P, "multilabel", Decision(rule)).tolist()
    return decided


# --- the rules -----------------------------------------------------------------------------------


def test_by_default_the_best_label_is_taken_when_none_reaches_a_half() -> None:
    decided = decide(P, "multilabel")
    assert decided.dtype == np.int8
    assert decided.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert decide([[0.2, 0.2, 0.1], [0.0, 0.0, 0.0]], "multilabel").tolist() == [[1, 1, 0], [0] * 3]


def test_one_label_is_decided_by_a_half() -> None:
    assert decide([[0.4], [0.5], [0.6]], "multilabel").tolist() == [[0], [1], [1]]


def test_one_class_the_first_if_tied() -> None:
    decided = decide([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], "multiclass")
    assert decided.dtype == np.int8
    assert decided.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_half_may_take_no_label() -> None:
    assert by("half") == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_the_largest_k_earlier_ones_first_if_tied() -> None:
    assert by("top-1") == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert by("top-2") == [[1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]]
    assert by("top-3") == [[1, 1, 1]] * 5
    tied = decide([[0.3, 0.7, 0.3, 0.3, 0.7]], "multilabel", Decision("top-3"))
    assert tied.tolist() == [[1, 1, 0, 0, 1]]


def test_thresholds_are_reached_not_passed() -> None:
    decision = Decision("thresholds", (0.4, 0.31, 0.2))
    assert decide(P, "multilabel", decision).tolist() == [
        [1, 0, 0],
        [1, 1, 1],
        [1, 0, 0],
        [0, 0, 1],
        [0, 0, 1],
    ]


def test_a_label_that_a_bag_cannot_have_is_not_taken() -> None:
    p = [[0.3, 0.0, 0.2], [0.0, 0.0, 0.1]]
    assert decide(p, "multilabel", Decision("top-2")).tolist() == [[1, 0, 1], [0, 0, 1]]
    free = Decision("thresholds", (0.0, 0.0, 0.15))
    assert decide(p, "multilabel", free).tolist() == [[1, 0, 1], [0, 0, 0]]
    chosen = choose_decision("thresholds", "multilabel", [[1], [1], [0]], [[0.004], [0.2], [0.0]])
    assert chosen.thresholds == (0.0,)
    assert decide([[0.004], [0.0]], "multilabel", chosen).tolist() == [[1], [0]]


# --- choosing thresholds -------------------------------------------------------------------------


def test_thresholds_by_hand() -> None:
    # Label 0: best for (0.2, 0.3], nearest 0.5 is 0.30. Label 1: apart at (0.45, 0.72], so 0.5.
    # Label 2: best for (0.61, 0.8], nearest is 0.62. Label 3: all yes is best, (−, 0.05].
    # Label 4 has no positive.
    p = [
        [0.30, 0.72, 0.61, 0.05, 0.9],
        [0.60, 0.90, 0.61, 0.30, 0.2],
        [0.20, 0.45, 0.80, 0.20, 0.1],
        [0.10, 0.10, 0.10, 0.90, 0.7],
    ]
    y = [[1, 1, 0, 1, 0], [1, 1, 0, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    decision = choose_decision("thresholds", "multilabel", y, p)
    assert decision == Decision("thresholds", (0.3, 0.5, 0.62, 0.05, 0.5), (4,))


def test_two_thresholds_as_near_the_lower() -> None:
    # F1 is 2/3 with all four said, 1/2 with the first two, 2/3 with the first alone.
    decision = choose_decision(
        "thresholds", "multilabel", [[1], [0], [1], [0]], [[0.9], [0.55], [0.445], [0.445]]
    )
    assert decision.thresholds == (0.44,)  # not 0.56, six steps from 0.5 as well


@pytest.mark.parametrize("seed", range(3))
def test_no_threshold_of_the_grid_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = (rng.random((43, 5)) < 0.3).astype(int)
    p = (0.3 * y + 0.7 * rng.random((43, 5))).round(2)
    decision = choose_decision("thresholds", "multilabel", y, p)
    for label, threshold in enumerate(decision.thresholds or ()):
        assert threshold in GRID
        said = [p[:, label] >= t for t in (threshold, *GRID)]
        f1 = [2 * (y[:, label] & d).sum() / (y[:, label].sum() + d.sum()) for d in said]
        assert f1[0] == max(f1[1:])


def test_only_thresholds_look_at_targets() -> None:
    for rule in ("default", "half", "top-2"):
        assert choose_decision(rule, "multilabel", [], P) == Decision(rule)
    assert choose_decision("default", "multiclass", [], P) == Decision()


def test_scores_use_the_decision_and_resamples_do_not_choose_again() -> None:
    rng = np.random.default_rng(5)
    y = (rng.random((61, 3)) < 0.4).astype(int)
    p = 0.4 * y + 0.6 * rng.random((61, 3))
    decision = Decision("thresholds", (0.31, 0.62, 0.5), (2,))
    result = evaluate(y, p, task="multilabel", decision=decision, intervals=61)
    decided = (p >= [0.31, 0.62, 0.5]).astype(int)
    assert result["f1_macro"] == pytest.approx(f1_score(y, decided, average="macro"))
    assert result["f1"] == pytest.approx(list(f1_score(y, decided, average=None)))
    assert result["positives"] == y.sum(0).tolist()
    assert (result["decision"], result["thresholds"]) == ("thresholds", [0.31, 0.62, 0.5])
    assert result["thresholds_kept"] == [2]
    counts = rng.integers(0, 4, size=(5, 61))
    scores, _, _ = ScoreTable.of(y.astype(float), p, "multilabel", decision).scores(
        counts.astype(float)
    )
    for row, count in enumerate(counts):
        again = [a.repeat(count, axis=0) for a in (y, decided)]
        assert scores[F1_MICRO][row] == pytest.approx(f1_score(*again, average="micro"))


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["best", "top-0", "top-", "top-2.5", "Half", "threshold", ""])
def test_unknown_rules_are_refused(rule: str) -> None:
    with pytest.raises(InputError, match="decision: expected default, half, thresholds or top-K"):
        TrainConfig(decision=rule)
    with pytest.raises(InputError, match="decision: expected default, half, thresholds or top-K"):
        decide(P, "multilabel", Decision(rule))


@pytest.mark.parametrize(
    ("rule", "task", "match"),
    [
        ("top-4", "multilabel", "at most top-3 of 3 labels, got 'top-4'; give a smaller number"),
        ("half", "multiclass", "expected default for a multi-class task, where each .* got 'half'"),
        ("thresholds", "multiclass", "expected default for a multi-class task"),
        ("top-2", "multiclass", "expected default for a multi-class task"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rule: str, task: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        choose_decision(rule, task, [[1, 0, 0]] * 5, P)
    with pytest.raises(InputError, match=match):
        decide(P, task, Decision(rule))


def test_thresholds_must_be_there_for_every_label() -> None:
    for thresholds in (None, (0.3,), (0.1,) * 4):
        with pytest.raises(InputError, match="thresholds: expected one for each of 3 labels, got"):
            decide(P, "multilabel", Decision("thresholds", thresholds))
    with pytest.raises(InputError, match=r"targets: expected numbers of .* \(5, 3\)"):
        choose_decision("thresholds", "multilabel", [[1, 0, 0]], P)
    with pytest.raises(InputError, match="task: expected 'multilabel' or 'multiclass', got 'both'"):
        decide(P, "both")  # type: ignore[arg-type]
