"""Scores: values by hand, agreement with scikit-learn, laws, undefined scores, bootstrap."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from dragn_cache.errors import InputError
from dragn_cache.scoring import intervals, metrics
from dragn_cache.scoring.decisions import DEFAULT, Decision
from dragn_cache.scoring.metrics import evaluate
from dragn_cache.scoring.one_class import warn_one_class, warn_one_class_tests
from dragn_cache.scoring.score_table import ScoreTable
from dragn_cache.scoring.scores import BY_NAME, SCORES

NAMES = [score.name for score in SCORES]

# Five bags, three labels; the third is never true. By default, thresholds are .5 .5 .4 .3 .4.
TARGETS = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
PROBABILITIES = np.array(
    [[0.9, 0.2, 0.1], [0.6, 0.7, 0.2], [0.4, 0.3, 0.1], [0.1, 0.3, 0.2], [0.2, 0.1, 0.4]]
)


def random_problem(
    seed: int, bags: int = 53, labels: int = 7, decimals: int = 17
) -> tuple[np.ndarray, np.ndarray]:
    """A multi-label problem; few decimals make ties."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((bags, labels)) < rng.uniform(0.1, 0.9, labels)).astype(np.int64)
    return targets, (0.3 * targets + 0.7 * rng.random((bags, labels))).round(decimals)


def random_classes(seed: int, bags: int = 53, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = np.eye(classes, dtype=np.int64)[rng.integers(classes, size=bags)]
    logits = np.exp(rng.normal(size=(bags, classes)) + targets)
    return targets, logits / logits.sum(axis=1, keepdims=True)


def without_intervals(targets: Any, probabilities: Any, task: Any = "multilabel") -> dict[str, Any]:
    return evaluate(targets, probabilities, task=task, intervals=0)


# --- values --------------------------------------------------------------------------------------


def test_values_by_hand() -> None:
    result = without_intervals(TARGETS, PROBABILITIES)
    assert result.pop("auc") == [pytest.approx(2 / 3), pytest.approx(11 / 12), None]
    assert result.pop("average_precision") == [pytest.approx(29 / 36), pytest.approx(5 / 6), None]
    assert result.pop("intervals") == dict.fromkeys(NAMES)
    assert result.pop("f1") == pytest.approx([2 / 3, 1 / 2, 0])
    assert result.pop("precision") == pytest.approx([2 / 3, 1 / 2, 0])
    assert result.pop("recall") == pytest.approx([2 / 3, 1 / 2, 0])
    assert result.pop("positives") == [3, 2, 0]
    assert (result.pop("decision"), result.pop("thresholds")) == ("default", None)
    assert result.pop("thresholds_kept") == []
    assert 0 < result.pop("ece_macro") < 1  # see test_calibration.py
    assert 0 < result.pop("ece") < 1
    assert result == {
        "auc_macro": pytest.approx(19 / 24),
        "f1_macro": pytest.approx(7 / 18),
        "f1_micro": pytest.approx(6 / 11),
        "precision_macro": pytest.approx(7 / 18),
        "recall_macro": pytest.approx(7 / 18),
        "sensitivity": pytest.approx(3 / 5),
        "specificity": pytest.approx(7 / 10),
        "f1_samples": pytest.approx(7 / 15),
        "auc_samples": pytest.approx(7 / 8),
        "map": pytest.approx(59 / 72),
        "accuracy": pytest.approx(1 / 5),
        "precision_macro_reference": pytest.approx(7 / 18),
        "brier": pytest.approx(2.36 / 15),
        "labels_undefined": 1,
        "bags": 5,
    }


def test_conventions_differ_for_a_label_never_predicted() -> None:
    targets, probabilities = [[1, 0], [1, 1], [0, 1]], [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]
    result = without_intervals(targets, probabilities)
    assert result["precision_macro"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["precision_macro_reference"] == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("decimals", [17, 1], ids=["distinct", "tied"])
@pytest.mark.parametrize("seed", range(3))
def test_multilabel_agrees_with_scikit_learn(seed: int, decimals: int) -> None:
    y, p = random_problem(seed, decimals=decimals)
    d = np.where(p >= np.minimum(0.5, p.max(axis=1, keepdims=True)), 1, 0)
    mixed = [i for i in range(len(y)) if 0 < y[i].sum() < y.shape[1]]
    tn, fp, _, _ = sk.confusion_matrix(y.ravel(), d.ravel()).ravel()
    result = without_intervals(y, p)
    for average in ("macro", "micro", "samples"):
        want = sk.f1_score(y, d, average=average, zero_division=0)
        assert result[f"f1_{average}"] == pytest.approx(want)
    assert result["precision_macro"] == pytest.approx(
        sk.precision_score(y, d, average="macro", zero_division=0)
    )
    assert result["recall_macro"] == pytest.approx(
        sk.recall_score(y, d, average="macro", zero_division=0)
    )
    assert result["sensitivity"] == pytest.approx(sk.recall_score(y, d, average="micro"))
    assert result["specificity"] == pytest.approx(tn / (tn + fp))
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(y, d))
    assert result["auc"] == pytest.approx(list(sk.roc_auc_score(y, p, average=None)))
    assert result["auc_macro"] == pytest.approx(sk.roc_auc_score(y, p))
    assert result["auc_samples"] == pytest.approx(
        np.mean([sk.roc_auc_score(y[i], p[i]) for i in mixed])
    )
    assert result["average_precision"] == pytest.approx(
        list(sk.average_precision_score(y, p, average=None))
    )
    assert result["map"] == pytest.approx(sk.average_precision_score(y, p))


@pytest.mark.parametrize("seed", range(3))
def test_multiclass_agrees_with_scikit_learn(seed: int) -> None:
    y, p = random_classes(seed)
    classes, predicted = y.argmax(axis=1), p.argmax(axis=1)
    result = without_intervals(y, p, "multiclass")
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(classes, predicted))
    assert result["auc_macro"] == pytest.approx(sk.roc_auc_score(classes, p, multi_class="ovr"))
    assert result["f1_macro"] == pytest.approx(
        sk.f1_score(classes, predicted, average="macro", zero_division=0)
    )
    assert result["sensitivity"] == pytest.approx(result["accuracy"])
    assert result["map"] == pytest.approx(sk.average_precision_score(y, p))


def test_single_label_agrees_with_scikit_learn() -> None:
    y, p = random_problem(3, labels=1)
    d = (p[:, 0] >= 0.5).astype(int)
    result = without_intervals(y, p)
    assert result["f1_macro"] == pytest.approx(sk.f1_score(y[:, 0], d))
    assert result["auc_macro"] == pytest.approx(sk.roc_auc_score(y[:, 0], p[:, 0]))
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(y[:, 0], d))
    assert result["f1_samples"] is None
    assert result["auc_samples"] is None


def test_single_precision_gives_the_same_ranks() -> None:
    y, p = random_problem(11, decimals=2)
    assert without_intervals(y, p.astype(np.float32))["auc"] == without_intervals(y, p)["auc"]


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_order_of_bags_changes_nothing(task: Any) -> None:
    y, p = random_problem(0) if task == "multilabel" else random_classes(0)
    shuffled = np.random.default_rng(1).permutation(len(y))
    assert evaluate(y[shuffled], p[shuffled], task=task, intervals=97) == evaluate(
        y, p, task=task, intervals=97
    )


def test_order_of_labels_only_moves_the_lists() -> None:
    y, p = random_problem(0)
    shuffled = np.random.default_rng(1).permutation(y.shape[1])
    before, after = without_intervals(y, p), without_intervals(y[:, shuffled], p[:, shuffled])
    for name in ("auc", "average_precision"):
        assert after[name] == [before[name][i] for i in shuffled]
    for name in NAMES:
        assert after[name] == pytest.approx(before[name])


def test_rank_scores_survive_a_monotone_transform() -> None:
    y, p = random_problem(4, decimals=1)
    before, after = without_intervals(y, p), without_intervals(y, p**3 / 2)
    for name in ("auc", "average_precision", "auc_macro", "auc_samples", "map"):
        assert after[name] == before[name]
    assert after["sensitivity"] != before["sensitivity"]


def test_auc_of_the_opposite_is_the_complement() -> None:
    y, p = random_problem(5, decimals=1)
    opposite = without_intervals(y, 1 - p)
    assert opposite["auc"] == pytest.approx([1 - auc for auc in without_intervals(y, p)["auc"]])


def test_perfect_and_constant_predictions() -> None:
    y = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1], [0, 1, 0]])
    perfect = without_intervals(y, y.astype(float))
    errors = {name for name, score in BY_NAME.items() if not score.higher_is_better}
    assert errors == {"brier", "ece", "ece_macro"}
    assert {perfect[name] for name in NAMES if name not in errors} == {1.0}
    assert {perfect[name] for name in errors} == {0.0}
    constant = without_intervals(y, np.full(y.shape, 0.3))
    assert constant["auc"] == [0.5, 0.5, 0.5]
    assert constant["auc_samples"] == 0.5
    assert constant["average_precision"] == pytest.approx([2 / 5, 3 / 5, 3 / 5])


@pytest.mark.parametrize("name", BY_NAME)
def test_averages_are_as_declared(name: str) -> None:
    y, p = random_problem(8, bags=37, decimals=2)
    half = {"task": "multilabel", "decision": Decision("half"), "intervals": 0}
    whole, score = evaluate(y, p, **half)[name], BY_NAME[name]
    assert 0 < whole < score.highest
    if score.average == "macro":
        own = [evaluate(y[:, [k]], p[:, [k]], **half)[name] for k in range(y.shape[1])]
        assert whole == pytest.approx(np.mean(own))
    elif score.average == "micro":
        assert whole == pytest.approx(evaluate(y.reshape(-1, 1), p.reshape(-1, 1), **half)[name])
    else:
        own = [evaluate(y[[k]], p[[k]], **half)[name] for k in range(len(y))]
        assert whole == pytest.approx(np.mean([score for score in own if score is not None]))


def test_weights_are_repetitions_of_bags() -> None:
    y, p = random_problem(6, bags=19, decimals=1)
    counts = np.random.default_rng(2).integers(0, 4, size=(5, 19))
    table = ScoreTable.of(y.astype(float), p, "multilabel", DEFAULT)
    scores, _, _ = table.scores(counts.astype(float))
    for row, count in enumerate(counts):
        want = without_intervals(y.repeat(count, axis=0), p.repeat(count, axis=0))
        for name in NAMES:
            assert scores[BY_NAME[name]][row] == pytest.approx(want[name]), name


# --- undefined -----------------------------------------------------------------------------------


def test_labels_with_one_class_are_counted_not_scored() -> None:
    y, p = random_problem(7, labels=3)
    always, never = np.ones((len(y), 1), int), np.zeros((len(y), 1), int)
    result = without_intervals(np.hstack([y, always, never]), np.hstack([p, p[:, :2]]))
    assert result["labels_undefined"] == 2
    assert result["auc"][3:] == [None, None]
    assert result["auc_macro"] == pytest.approx(sk.roc_auc_score(y, p))
    assert result["average_precision"][3:] == [None, None]
    assert result["map"] == pytest.approx(sk.average_precision_score(y, p))


@pytest.mark.parametrize("share", [0, 1])
def test_bags_of_one_class_have_no_rank_scores_and_no_intervals_of_them(share: int) -> None:
    y, p = np.full((11, 1), share), random_problem(3, bags=11, labels=1)[1]
    result = evaluate(y, p, task="multilabel", intervals=100)
    classes = evaluate(np.eye(3)[np.zeros(11, int)], np.full((11, 3), 1 / 3), task="multiclass")
    for scores, labels in ((result, 1), (classes, 3)):
        assert scores["auc"] == scores["average_precision"] == [None] * labels
        for name in ("map", "auc_macro"):
            assert scores[name] is None
            assert scores["intervals"][name] is None
        assert scores["accuracy"] is not None
        assert scores["labels_undefined"] == labels
    tests = [metrics.ScoredBags(np.arange(k, 11, 2), y[k::2], p[k::2]) for k in (0, 1)]
    assert metrics.mean_intervals(tests, 11, task="multilabel")["map"] is None


def test_labels_of_one_class_are_named() -> None:
    told: list[str] = []
    labels = ("a", "b", "c")
    warn_one_class(TARGETS, labels, "new bags", told.append)
    warn_one_class(TARGETS[:, 2:], ("c",), "test bags", told.append)
    warn_one_class(TARGETS[:, :2], labels[:2], "test bags", told.append)
    many = tuple("abcdefgh")
    warn_one_class(np.hstack([TARGETS[:, :1], np.ones((5, 7))]), many, "test bags", told.append)
    assert told == [
        "the 5 new bags have one class only of c: AUC and mAP leave such labels out",
        "the 5 test bags have one class only of every label: AUC and mAP are undefined, accuracy "
        "and F1 tell nothing",
        "the 5 test bags have one class only of b, c, d, e, f and 2 more: AUC and mAP leave such "
        "labels out",
    ]
    told.clear()
    halves = [TARGETS[:2].astype(np.int8), TARGETS[2:].astype(np.int8)]
    warn_one_class_tests(halves, labels, told.append)
    one = TARGETS[[0, 2]].astype(np.int8)  # a always, c never
    warn_one_class_tests([one[:, ::2], halves[0][:, ::2]], ("a", "c"), told.append)
    assert told == [
        "in every test fold the bags have one class only of c: AUC and mAP leave such labels out",
        "in 1 of 2 test folds the bags have one class only of every label: AUC and mAP are "
        "undefined there, accuracy and F1 tell nothing",
        "in every test fold the bags have one class only of c: AUC and mAP leave such labels out",
    ]


def test_no_bags_no_scores() -> None:
    result = evaluate(np.zeros((0, 3), int), np.zeros((0, 3)), task="multilabel")
    assert [result[name] for name in NAMES] == [None] * len(NAMES)
    assert result["f1"] == [0.0] * 3
    assert result["positives"] == [0] * 3
    assert result["auc"] == result["average_precision"] == [None] * 3
    assert (result["labels_undefined"], result["bags"]) == (3, 0)
    assert result["intervals"] == dict.fromkeys(NAMES)


def test_nothing_true_and_nothing_predicted_leaves_micro_scores_undefined() -> None:
    result = without_intervals([[0], [0]], [[0.1], [0.2]])
    assert result["f1_micro"] is None
    assert result["sensitivity"] is None
    assert result["specificity"] == 1.0
    assert result["accuracy"] == 1.0
    everything = without_intervals([[1, 1]], [[0.9, 0.8]])
    assert everything["specificity"] is None
    assert everything["auc_samples"] is None
    assert everything["auc_macro"] is None


def test_result_is_json_without_nan() -> None:
    result = evaluate(TARGETS, PROBABILITIES, task="multilabel", intervals=61)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# --- intervals -----------------------------------------------------------------------------------


def test_interval_of_accuracy_is_the_binomials() -> None:
    bags, right = 211, 151
    y = np.zeros((bags, 1), int)
    p = np.where(np.arange(bags) < right, 0.1, 0.9)[:, None]
    low, high = evaluate(y, p, task="multilabel", intervals=4001)["intervals"]["accuracy"]
    want = stats.binom.ppf([0.025, 0.975], bags, right / bags) / bags
    assert [low, high] == pytest.approx(want.tolist(), abs=1.5 / bags)


def test_intervals_hold_the_score_and_shrink_with_more_bags() -> None:
    few, many = random_problem(8, bags=101), random_problem(8, bags=1601)
    widths = []
    for y, p in (few, many):
        result = evaluate(y, p, task="multilabel", intervals=401)
        low, high = result["intervals"]["auc_macro"]
        assert low < result["auc_macro"] < high
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 6  # the square root of 16, with noise


def test_seed_decides_the_intervals_alone() -> None:
    y, p = random_problem(9)
    first, again, other = (
        evaluate(y, p, task="multilabel", intervals=97, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert first["intervals"] != other["intervals"]
    assert all(first[name] == other[name] for name in NAMES)


def test_chunks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    y, p = random_problem(10, bags=31)
    whole = evaluate(y, p, task="multilabel", intervals=97)
    monkeypatch.setattr(intervals, "CHUNK_WEIGHTS", 31 * 7)
    chunked = evaluate(y, p, task="multilabel", intervals=97)
    for name in NAMES:
        assert chunked["intervals"][name] == pytest.approx(whole["intervals"][name]), name


def test_undefined_resamples_are_left_out() -> None:
    # Half of the resamples of two bags hold one bag twice: there the AUC is undefined.
    y, p = [[1], [0]], [[0.9], [0.6]]
    assert evaluate(y, p, task="multilabel", intervals=101)["intervals"]["auc_macro"] == [1.0, 1.0]
    few = evaluate(y, p, task="multilabel", intervals=23)["intervals"]
    assert few["auc_macro"] is None
    assert few["accuracy"] == [0.0, 1.0]
    none = evaluate(y, p, task="multilabel", intervals=19)["intervals"]
    assert none == dict.fromkeys(NAMES)


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "probabilities", "match"),
    [
        ([[1, 0]], [[0.1, np.nan]], r"bag 0, label 1: expected a probability in \[0, 1\], got nan"),
        ([[1, 0]], [[0.1, 1.5]], "got 1.5; give probabilities, not logits"),
        ([[1, 0]], [[-0.1, 0.5]], "got -0.1"),
        ([[1, 0]], [0.1, 0.5], r"probabilities: expected numbers of shape .* \(2,\)"),
        ([[]], [[]], r"at least one label, got float64 of shape \(1, 0\)"),
        ([[1, 0]], [["a", "b"]], "probabilities: expected numbers"),
        ([[1, 0, 1]], [[0.1, 0.5]], r"targets: expected .* \(1, 2\), got int64 of shape \(1, 3\)"),
        ([[1, 0], [1, 0]], [[0.1, 0.5]], r"targets: expected .* shape \(2, 2\)"),
        ([[1, 2]], [[0.1, 0.5]], "targets, bag 0, label 1: expected 0 or 1, got 2"),
        ([[1, np.nan]], [[0.1, 0.5]], "targets, bag 0, label 1: expected 0 or 1, got nan"),
    ],
)
def test_wrong_arrays_are_refused(targets: Any, probabilities: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        without_intervals(targets, probabilities)


def test_multiclass_needs_one_hot_rows() -> None:
    with pytest.raises(InputError, match="bag 1: expected exactly one class, got 2 classes"):
        without_intervals([[1, 0], [1, 1]], [[0.1, 0.9], [0.5, 0.5]], "multiclass")


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"intervals: expected .* got -1"):
        evaluate(TARGETS, PROBABILITIES, task="multilabel", intervals=-1)
    with pytest.raises(InputError, match="task: expected 'multilabel' or 'multiclass', got 'both'"):
        without_intervals(TARGETS, PROBABILITIES, "both")


# --- means over several tests --------------------------------------------------------------------


def test_intervals_of_one_test_are_those_of_evaluate() -> None:
    y, p = random_problem(5)
    order = np.lexsort(np.hstack([y, p]).T)  # evaluate's own order
    test = metrics.ScoredBags(np.arange(53), y[order], p[order])
    found = metrics.mean_intervals([test], 53, task="multilabel", intervals=70, seed=3)
    scores = evaluate(y, p, task="multilabel", intervals=70, seed=3)
    for name, interval in scores["intervals"].items():
        low, high = found[name] or (None, None)
        assert high - low == pytest.approx(interval[1] - interval[0], abs=1e-12)
        assert low < scores[name] < high
    same = metrics.mean_intervals([test, test], 53, task="multilabel", intervals=70, seed=3)
    for name, interval in found.items():
        assert same[name] == pytest.approx(interval, abs=1e-12)


def test_intervals_of_means_weigh_a_bag_alike_in_every_test() -> None:
    y, p = random_classes(2, bags=31)
    rows = [np.array([0, 2, 5, 7, 11, 30]), np.arange(13, 30), np.arange(4, 17)]
    tests = [metrics.ScoredBags(r, y[r], p[r]) for r in rows]
    found = metrics.mean_intervals(tests, 31, task="multiclass", intervals=90, seed=7)
    right = p.argmax(1) == y.argmax(1)
    means = []
    for drawn in np.random.default_rng(7).integers(31, size=(90, 31)):
        accuracies = [right[drawn[np.isin(drawn, r)]] for r in rows]
        means.append(np.mean([own.mean() for own in accuracies if len(own)]))
    bias = np.mean(means) - np.mean([right[r].mean() for r in rows])
    expected = np.percentile(means, [2.5, 97.5]) - bias
    assert found["accuracy"] == pytest.approx(expected, abs=1e-12)


def test_without_tests_or_resamples_there_are_no_intervals() -> None:
    y, p = random_problem(1)
    test = metrics.ScoredBags(np.arange(53), y, p)
    for tests, draws in (([], 50), ([test], 0)):
        found = metrics.mean_intervals(tests, 53, task="multilabel", intervals=draws)
        assert found == dict.fromkeys(NAMES)
