"""Classical methods: formulas by hand, words from training bags, machines of scikit-learn."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dragn_cache_cli.app import app
from run_stores import LABELS, make_bags, make_features, with_splits, write_store
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from sklearn.mixture import GaussianMixture
from sklearn.svm import SVC
from typer.testing import CliRunner

from dragn_cache.classical import CLASSICAL, ClassicalModel, create_classical
from dragn_cache.classical.base import principal_axes, projected
from dragn_cache.classical.model import SAMPLE, sampled
from dragn_cache.classical.svm import (
    C_GRID,
    GAMMA_GRID,
    LEAST_SLOPE,
    Examples,
    _folds,
    decision_values,
    fit_machines,
    fit_sigmoid,
    machine_probabilities,
)
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.ragged import RaggedBags
from dragn_cache.runs.checkpoint import load_checkpoint
from dragn_cache.runs.predict import predict_run
from dragn_cache.runs.train import train_run
from dragn_cache.store import Store
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.fit import ClassicalFitted, fit_method
from dragn_cache.training.methods import method_facts, method_names
from dragn_cache.types import Task

SIZES = [3, 1, 7, 2, 11]
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)])
every_method = pytest.mark.parametrize("name", sorted(CLASSICAL))


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


INSTANCES = drawn(1, sum(SIZES), 5)
WORDS = {"words": drawn(2, 4, 5)}
MIXTURE = {
    "weights": np.array([0.2, 0.5, 0.3]),
    "means": drawn(3, 3, 5),
    "deviations": 0.5 + np.abs(drawn(4, 3, 5)),
}
ARRAYS = {"bovw": WORDS, "vlad": WORDS, "fisher": MIXTURE, "svm": {}}


def bags_of(instances: np.ndarray) -> list[np.ndarray]:
    return [instances[a:b] for a, b in pairwise(OFFSETS)]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def roots(vector: np.ndarray) -> np.ndarray:
    return np.sign(vector) * np.abs(vector) ** 0.5


def encode(name: str, **options: Any) -> np.ndarray:
    return create_classical(name, options).encode(ARRAYS[name], INSTANCES, OFFSETS)


# --- encodings ---------------------------------------------------------------------------------


def test_bag_of_words_counts_the_nearest_word() -> None:
    counts = []
    for bag in bags_of(INSTANCES):
        distances = [[((x - w) ** 2).sum() for w in WORDS["words"]] for x in bag]
        words = [int(np.argmin(d)) for d in distances]
        counts.append([words.count(k) for k in range(4)])
    expected = np.array(counts, float)
    shares = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(encode("bovw"), shares, rtol=1e-12)
    np.testing.assert_allclose(encode("bovw", normalise="power"), np.sqrt(shares), rtol=1e-12)
    np.testing.assert_allclose(
        encode("bovw", normalise="l2"), [unit(row) for row in expected], rtol=1e-12
    )


def test_vlad_sums_what_separates_instances_from_their_word() -> None:
    whole, power, intra = [], [], []
    for bag in bags_of(INSTANCES):
        parts = np.zeros((4, 5))
        for x in bag:
            k = int(np.argmin(((x - WORDS["words"]) ** 2).sum(1)))
            parts[k] += x - WORDS["words"][k]
        whole.append(unit(parts.ravel()))
        power.append(unit(roots(parts.ravel())))
        each = np.array([unit(part) if part.any() else part for part in parts])
        intra.append(unit(each.ravel()))
    np.testing.assert_allclose(encode("vlad", normalise="l2"), whole, rtol=1e-10)
    np.testing.assert_allclose(encode("vlad"), power, rtol=1e-10)
    np.testing.assert_allclose(encode("vlad", normalise="intra"), intra, rtol=1e-10)


def log_likelihood(bag: np.ndarray, means: np.ndarray, deviations: np.ndarray) -> float:
    z = (bag[:, None] - means) / deviations
    densities = np.exp(-(z**2).sum(2) / 2) / np.prod(deviations * np.sqrt(2 * np.pi), axis=1)
    return float(np.log(densities @ MIXTURE["weights"]).sum())


def test_fisher_vectors_are_the_gradients_of_the_likelihood() -> None:
    # They are d log p / dμ · σ / (n √w) and d log p / dσ · σ / (n √2w): by differences here.
    step, expected = 1e-5, []
    w, means, deviations = MIXTURE["weights"], MIXTURE["means"], MIXTURE["deviations"]
    for bag in bags_of(INSTANCES):
        row = []
        for which, factor in ((0, 1), (1, 2)):
            for k, d in np.ndindex(3, 5):
                shift = np.zeros((3, 5))
                shift[k, d] = step
                up, down = [means, deviations], [means, deviations]
                up[which], down[which] = up[which] + shift, down[which] - shift
                slope = (log_likelihood(bag, *up) - log_likelihood(bag, *down)) / (2 * step)
                row.append(slope * deviations[k, d] / (len(bag) * np.sqrt(factor * w[k])))
        expected.append(row)
    plain = np.array(expected)
    np.testing.assert_allclose(encode("fisher", normalise="none"), plain, atol=1e-8)
    np.testing.assert_allclose(
        encode("fisher", normalise="l2"), [unit(row) for row in plain], atol=1e-8
    )
    improved = encode("fisher")
    np.testing.assert_allclose((improved**2).sum(1), 1)
    np.testing.assert_allclose(improved, [unit(roots(row)) for row in plain], atol=1e-4)


def test_fisher_vectors_are_scikit_images() -> None:
    # Its vector starts with the gradients by the K weights, which are left out here, and its
    # gradients by the deviations have the other sign.
    from skimage.feature import fisher_vector

    mixture = GaussianMixture(3, covariance_type="diag")
    mixture.weights_, mixture.means_ = MIXTURE["weights"], MIXTURE["means"]
    mixture.covariances_ = MIXTURE["deviations"] ** 2
    mixture.precisions_cholesky_ = 1 / MIXTURE["deviations"]
    signs = np.repeat([1, -1], 3 * 5)
    plain = [fisher_vector(bag, mixture)[3:] * signs for bag in bags_of(INSTANCES)]
    np.testing.assert_allclose(encode("fisher", normalise="none"), plain, rtol=1e-9, atol=1e-12)
    # Its norm counts the gradients by the weights as well.
    improved = [fisher_vector(bag, mixture, improved=True)[3:] for bag in bags_of(INSTANCES)]
    expected = [unit(vector * signs) for vector in improved]
    np.testing.assert_allclose(encode("fisher", normalise="power"), expected, rtol=1e-9, atol=1e-9)


def test_transfer_takes_the_mean_of_a_bag() -> None:
    means = np.array([bag.mean(0) for bag in bags_of(INSTANCES)])
    np.testing.assert_allclose(encode("svm", normalise="none"), means, rtol=1e-12)
    np.testing.assert_allclose(encode("svm"), [unit(row) for row in means], rtol=1e-12)


@every_method
def test_a_bag_does_not_depend_on_its_batch_mates_or_its_order(name: str) -> None:
    method, together = create_classical(name, {}), encode(name)
    for row, bag in zip(together, bags_of(INSTANCES), strict=True):
        ends = np.array([0, len(bag)])
        np.testing.assert_allclose(method.encode(ARRAYS[name], bag, ends)[0], row, atol=1e-12)
        np.testing.assert_allclose(method.encode(ARRAYS[name], bag[::-1], ends)[0], row, atol=1e-7)


def test_a_mixture_far_from_an_instance_stays_finite() -> None:
    far = create_classical("fisher", {}).encode(MIXTURE, 1e3 + INSTANCES, OFFSETS)
    assert np.isfinite(far).all()


def test_axes_are_those_of_pca() -> None:
    x = drawn(5, 41, 7) @ drawn(6, 7, 7)
    expected = PCA(3, svd_solver="full").fit(x)
    axes = principal_axes(x, 3)
    signs = np.sign((axes["axes"] * expected.components_).sum(1))
    np.testing.assert_allclose(projected(axes, x), expected.transform(x) * signs, atol=1e-10)
    assert (axes["axes"][np.arange(3), np.abs(axes["axes"]).argmax(1)] > 0).all()
    covariance = np.cov(x.T)
    variances = np.linalg.eigvalsh(covariance)[:-4:-1]
    np.testing.assert_allclose(axes["axes"] @ axes["axes"].T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(axes["axes"] @ covariance, variances[:, None] * axes["axes"])
    far = principal_axes(x + 1e6, 3)
    np.testing.assert_allclose(far["axes"], axes["axes"], atol=1e-8)
    with pytest.raises(InputError, match="at most 7 axes of 41 training instances with 7 channels"):
        principal_axes(x, 8)


# --- machines ----------------------------------------------------------------------------------

T, V = 37, 23


def examples(labels: int = 2, *, seed: int = 7, groups: tuple[str, ...] = ("",) * T) -> Examples:
    x = drawn(seed, T + V, 3)
    noise = drawn(seed + 1, T + V, labels)
    return Examples(x, (x[:, :1] + 0.7 * noise > 0.2).astype(np.int8), groups)


@pytest.mark.parametrize("svm", ["linear", "rbf"])
def test_machines_are_scikit_learns(svm: str) -> None:
    data = examples()
    gamma = {"gamma": 0.3} if svm == "rbf" else {}
    method = create_classical("vlad", {"svm": svm, "c": 2, **gamma})
    arrays, choices = fit_machines(data, method, [1.0, 2.5], 0)
    x, y = data.encoded, data.targets
    for k, weight in enumerate((1.0, 2.5)):
        machine = SVC(C=2, kernel=svm, gamma=0.3, class_weight={0: 1, 1: weight})
        expected = machine.fit(x[:T], y[:T, k]).decision_function(x)
        np.testing.assert_allclose(decision_values(arrays, x)[:, k], expected, atol=2e-3)
        slope, offset = fit_sigmoid(expected[T:], y[T:, k])
        p = machine_probabilities(arrays, x, "multilabel")[:, k]
        np.testing.assert_allclose(p, 1 / (1 + np.exp(-slope * expected - offset)), atol=2e-3)
        score = average_precision_score(y[T:, k], expected[T:])
        assert choices[k].average_precision == pytest.approx(score)
        assert choices[k].note == ""


def test_validation_chooses_c_and_gamma() -> None:
    data = examples()
    x, y = data.encoded, data.targets[:, 0]
    _, choices = fit_machines(data, create_classical("svm", {"select": "validation"}), [1, 1], 0)
    unit = ((x[:T, None] - x[:T]) ** 2).sum(2).mean()
    scores = {}
    for gamma in GAMMA_GRID:
        for c in C_GRID:
            held = SVC(C=c, gamma=gamma / unit).fit(x[:T], y[:T]).decision_function(x[T:])
            scores[c, gamma / unit] = average_precision_score(y[T:], held)
    chosen = choices[0]
    assert chosen.judge == "validation"
    assert chosen.average_precision == pytest.approx(max(scores.values()), abs=1e-3)
    nearest = min(scores, key=lambda s: abs(s[0] - chosen.c) + abs(s[1] - chosen.gamma))
    assert scores[nearest] == pytest.approx(max(scores.values()), abs=1e-3)


def test_folds_of_training_bags_choose_without_looking_at_validation() -> None:
    groups = tuple(f"g{k // 3}" if k % 5 else "" for k in range(T))
    data = examples(groups=groups)
    method = create_classical("svm", {"svm": "linear"})
    _, choices = fit_machines(data, method, [1, 1], 0)
    other = replace(data, encoded=data.encoded.copy())
    other.encoded[T:] = drawn(9, V, 3)
    _, again = fit_machines(other, method, [1, 1], 0)
    for a, b in zip(choices, again, strict=True):
        assert a.judge == "folds"
        assert (a.c, a.average_precision) == (b.c, b.average_precision)
        assert a.slope != b.slope  # probabilities come from the validation bags
    parts = _folds(data.targets[:T, 0], groups, 0)
    assert sorted(np.concatenate([held for _, held in parts])) == list(range(T))
    for fitted, held in parts:
        assert not set(fitted) & set(held)
        assert not {groups[k] for k in fitted} & {groups[k] for k in held} - {""}


def test_probabilities_are_of_greatest_likelihood() -> None:
    f, y = drawn(11, 29), (drawn(12, 29) + drawn(11, 29) > 0).astype(np.int8)
    slope, offset = fit_sigmoid(f, y)
    p = 1 / (1 + np.exp(-slope * f - offset))
    n = int(y.sum())
    t = np.where(y == 1, (n + 1) / (n + 2), 1 / (29 - n + 2))
    assert abs((p - t).sum()) < 1e-6
    assert abs((f * (p - t)).sum()) < 1e-6
    # Scores that separate the labels, and scores of the wrong sign, give probabilities that rank.
    assert 0 < fit_sigmoid(np.array([-1.0, -2, 3, 4]), np.array([0, 0, 1, 1], np.int8))[0] < 50
    slope, offset = fit_sigmoid(-f, y)
    assert slope == LEAST_SLOPE
    p = 1 / (1 + np.exp(LEAST_SLOPE * f - offset))
    assert abs((p - t).sum()) < 1e-6
    assert fit_sigmoid(np.zeros(29), y)[0] == LEAST_SLOPE


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("labels", ["of their order", "of chance"])
def test_probabilities_are_of_greatest_likelihood_wherever_scores_lie(
    scale: float, labels: str
) -> None:
    # Steps of Newton's method stopped far from the optimum on scores in the thousands.
    x, noise = drawn(13, 29), drawn(14, 29)
    y = (noise + (x if labels == "of their order" else 0) > 1).astype(np.int8)
    f = scale * (x + 3)
    slope, offset = fit_sigmoid(f, y)
    n = int(y.sum())
    away = 1 / (1 + np.exp(-slope * f - offset)) - np.where(y == 1, (n + 1) / (n + 2), 1 / (31 - n))
    assert abs(away.sum()) < 1e-6
    if slope > LEAST_SLOPE:
        assert abs((f * away).sum()) < 1e-6 * scale
    else:
        assert slope == LEAST_SLOPE
        assert (f * away).sum() > 0  # less slope would be better


def test_classes_share_one() -> None:
    data = examples(3)
    arrays, _ = fit_machines(data, create_classical("vlad", {"c": 1.0}), [1, 1, 1], 0)
    each = machine_probabilities(arrays, data.encoded, "multilabel")
    shared = machine_probabilities(arrays, data.encoded, "multiclass")
    np.testing.assert_allclose(shared, each / each.sum(1, keepdims=True), rtol=1e-10)


def test_labels_that_cannot_be_judged_as_usual_say_so() -> None:
    data = examples(5)
    y = data.targets
    y[:T, 0], y[:T, 1] = 0, 1  # one class in training
    y[T:, 2] = 0  # one class in validation
    y[:T, 3], y[T:, 3] = 0, 0  # one positive in training, none in validation
    y[5, 3] = 1
    arrays, choices = fit_machines(data, create_classical("vlad", {"c": 1.0}), [1] * 5, 0)
    p = machine_probabilities(arrays, data.encoded, "multilabel")
    for k, share in ((0, 1 / 39), (1, 38 / 39), (3, 2 / 39)):
        assert choices[k].judge == "none"
        np.testing.assert_allclose(p[:, k], share)
    assert choices[0].note == "0 of 37 training bags have it: its probability is always 0.0256"
    assert "1 of 37 training bags have it, too few to hold some out" in choices[3].note
    assert choices[2].judge == "folds"
    assert "C and γ are chosen on folds: validation lacked a class" in choices[2].note
    assert "probabilities come from training folds" in choices[2].note
    assert choices[4].note == ""
    assert average_precision_score(y[:T, 2], p[:T, 2]) > y[:T, 2].mean() + 0.1


# --- whole models ------------------------------------------------------------------------------


def labelled(count: int = 61, *, task: Task = "multilabel", vectors: bool = False) -> LabelledBags:
    bags = with_splits(make_bags(count, task=task))
    features = make_features(bags)
    targets = np.array([[label in (bag.labels or ()) for label in LABELS] for bag in bags], np.int8)
    ragged = RaggedBags.from_list([torch.from_numpy(features[bag.bag_id]) for bag in bags])
    if vectors:
        ragged = RaggedBags(ragged.values.mean((2, 3), dtype=torch.float64), ragged.offsets)
    return LabelledBags(ragged, targets, tuple(bag.split for bag in bags), task)


def fit(data: LabelledBags, name: str, **settings: Any) -> ClassicalFitted:
    config = TrainConfig(aggregator=name, **settings)
    fitted = fit_method(data, config, labels=LABELS)
    assert isinstance(fitted, ClassicalFitted)
    return fitted


# C and γ are given where the search is not what a test is about: it takes most of the time.
RBF = {"svm": "rbf", "c": 10, "gamma": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "bovw": {"words": 7, "svm": "linear"},
    "fisher": {"words": 2, "c": 10},
    "svm": {"select": "validation", **RBF},
    "vlad": {"words": 3, "pca": 4, **RBF},
}


@every_method
def test_what_is_fitted_comes_from_training_bags_alone(name: str) -> None:
    data = labelled()
    first = fit(data, name, options=OPTIONS[name], scale="standard")
    for split in ("validation", "test"):
        rows = data.rows(split)
        values, targets = data.bags.values.clone(), data.targets.copy()
        for row in rows:
            start, end = data.bags.offsets[row : row + 2].tolist()
            values[start:end] = 5 - 2 * values[start:end]
        targets[rows] = 1 - targets[rows]
        other = replace(data, bags=RaggedBags(values, data.bags.offsets), targets=targets)
        second = fit(other, name, options=OPTIONS[name], scale="standard")
        ours, theirs = first.model.state_dict(), second.model.state_dict()
        for key, value in ours.items():
            if split == "test" or not key.startswith("machines"):
                assert torch.equal(value, theirs[key]), (split, key)
        assert (first.choices == second.choices) == (split == "test")
        assert not np.array_equal(first.probabilities, second.probabilities)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
@every_method
def test_a_saved_model_gives_the_same_probabilities(name: str, task: Task) -> None:
    data = labelled(task=task)
    fitted = fit(data, name, options=OPTIONS[name], scale="standard")
    file = io.BytesIO()
    torch.save(fitted.model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    method = create_classical(name, OPTIONS[name])
    again = ClassicalModel.from_state(method, data.bags.in_shape, state)
    np.testing.assert_array_equal(again.predict(data.bags, task), fitted.probabilities)
    alone = again.predict(data.bags.select([4]), task)
    np.testing.assert_allclose(alone[0], fitted.probabilities[4], rtol=1e-12)
    assert (fitted.probabilities.sum(1).round(9) == 1).all() == (task == "multiclass")
    with pytest.raises((LookupError, ValueError, RuntimeError)):
        ClassicalModel.from_state(method, (7,), state)


def test_maps_are_averaged_first() -> None:
    options = OPTIONS["vlad"]
    maps, vectors = labelled(), labelled(vectors=True)
    np.testing.assert_allclose(
        fit(maps, "vlad", options=options).probabilities,
        fit(vectors, "vlad", options=options).probabilities,
        atol=1e-6,
    )


def test_seeds_and_positive_weights_are_read() -> None:
    data = labelled()
    first = fit(data, "vlad", options={"words": 5, "c": 1})
    again = fit(data, "vlad", options={"words": 5, "c": 1})
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    other = fit(data, "vlad", options={"words": 5, "c": 1}, seed=2**40 + 3)
    assert not torch.equal(
        first.model.state_dict()["encoding.words"], other.model.state_dict()["encoding.words"]
    )
    heavy = fit(data, "vlad", options={"words": 5, "c": 1}, pos_weight=20.0)
    encoded = next(heavy.model.encode(data.bags))
    before = decision_values(first.model.machines, encoded)
    assert (decision_values(heavy.model.machines, encoded).mean(0) > before.mean(0)).all()
    with pytest.raises(InputError, match="pos_weight: expected a number above 0 for an SVM"):
        fit(data, "vlad", pos_weight=0.0)
    with pytest.raises(InputError, match="expected a multi-label task"):
        fit(labelled(task="multiclass"), "vlad", pos_weight=2.0)


def test_many_instances_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SAMPLE >= 10_000
    data = labelled()
    training = data.rows("train")
    everything = sampled(data.bags, training, None, 0)
    monkeypatch.setattr("dragn_cache.classical.model.SAMPLE", 31)
    some = sampled(data.bags, training, None, 0)
    assert some.shape == (31, 5)
    assert {tuple(row) for row in some} < {tuple(row) for row in everything}


# --- mistakes ----------------------------------------------------------------------------------

MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    (
        "vlad",
        {"wrds": 3},
        r"aggregator vlad: .* option, got 'wrds'; did you mean words\?",
    ),
    ("vlad", {"words": 0}, "aggregator vlad, option words: expected a whole number of at least 1"),
    ("vlad", {"normalise": "l1"}, "option normalise: expected l2, power or intra"),
    ("svm", {"svm": "poly"}, "aggregator svm, option svm: expected linear or rbf"),
    ("svm", {"select": "test"}, "option select: expected validation or folds"),
    ("svm", {"c": 0}, "option c: expected a number above 0 or search, got 0"),
    ("fisher", {"gamma": 2.0}, "option gamma: expected none with svm=linear, got 2.0"),
    ("svm", {"pca": 1.5}, "option pca: expected a whole number of at least 1"),
    ("svm", {"words": 3}, "a known option, got 'words'"),
]


@pytest.mark.parametrize(("name", "options", "message"), MISTAKES)
def test_mistakes_name_the_option(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_classical(name, options)


def test_too_few_instances_are_said() -> None:
    data = labelled()
    with pytest.raises(
        InputError, match=r"words: expected at most the number of distinct training"
    ):
        fit(data, "vlad", options={"words": 1000})
    values = torch.ones_like(data.bags.values)
    with pytest.raises(InputError, match=r"instances, 1, got 8; give fewer, or more training bags"):
        fit(replace(data, bags=RaggedBags(values, data.bags.offsets)), "bovw")
    with pytest.raises(InputError, match="option pca: expected at most 5 axes"):
        fit(data, "svm", options={"pca": 6})


def test_vectors_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dragn_cache.classical.model.memory_for_features", lambda text, device: 1000
    )
    with pytest.raises(InputError, match=r"for 30 numbers a bag; give the option pca=64"):
        fit(labelled(), "fisher", options={"words": 3})


def test_bags_that_do_not_fit_are_refused() -> None:
    data = labelled()
    model = fit(data, "svm", options={"select": "validation", "c": 1, "gamma": 1}).model
    with pytest.raises(InputError, match=r"expected instances of shape \(5, 2, 3\), got \(7,\)"):
        model.predict(RaggedBags(torch.zeros(2, 7), torch.tensor([0, 2])), "multilabel")
    empty = RaggedBags(torch.zeros(2, 5, 2, 3), torch.tensor([0, 2, 2]))
    with pytest.raises(InputError, match="expected at least one instance in each, got an empty"):
        model.predict(empty, "multilabel")


def test_names_are_offered_from_both_kinds() -> None:
    assert method_names() == sorted(method_names())
    assert {"vlad", "dragn"} <= set(method_names())
    with pytest.raises(UnknownNameError, match="did you mean vlad"):
        method_facts("vlda")
    with pytest.raises(UnknownNameError, match="did you mean dragn"):
        method_facts("drgn")


# --- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    bags = make_bags(101)
    return write_store(tmp_path_factory.mktemp("s") / "made.features", bags, make_features(bags))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def probabilities(path: Path) -> np.ndarray:
    return np.array([[float(row[f"p_{label}"]) for label in LABELS] for row in table(path)])


def command(*args: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == 0, result.stderr
    return result


def test_the_commands_train_predict_and_list_them(store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = ("train-agg", "--store", store.path, "--aggregator", "vlad", "--out", run)
    options = ("--option", "words=8", "--option", "svm=linear", "--scale", "standard")
    result = command(*base, *options, "--epochs", 7, "--views", "random", "--intervals", 0)
    assert "warning: vlad is not trained by gradients" in result.stderr
    assert "does not read --epochs, --views" in " ".join(result.stderr.split())
    files = ["checkpoint.pt", "config.toml", "metrics.json", "predictions.csv", "selection.csv"]
    assert sorted(path.name for path in run.iterdir()) == ["SHA256SUMS", *files, "splits.csv"]
    settings = tomllib.loads((run / "config.toml").read_text())["train"]
    assert settings["options"] == {"words": 8, "svm": "linear"}
    assert (settings["scale"], settings["tap"], "epochs" in settings) == ("standard", "gap", False)
    rows = table(run / "selection.csv")
    assert [row["label"] for row in rows] == list(LABELS)
    assert {row["judge"] for row in rows} == {"validation"}
    command("predict", run, "--store", store.path, "--out", tmp_path / "again")
    np.testing.assert_allclose(
        probabilities(tmp_path / "again" / "predictions.csv"),
        probabilities(run / "predictions.csv"),
        rtol=1e-12,
    )
    facts = json.loads(command("aggregators", "--json").stdout)
    kind = {"order_sensitive": False, "attention": False, "classifier": "svm"}
    assert facts["vlad"].pop("options")["svm"] == "linear"
    assert facts["vlad"].pop("described")["svm"]["expected"] == "linear or rbf"
    assert facts["vlad"] == {"needs": "any", **kind}
    assert facts["dragn"]["classifier"] == "head"
    assert re.search(r"fisher +any +no +no +svm", command("aggregators").stdout)


def test_the_same_seed_gives_the_same_bytes(store: Store, tmp_path: Path) -> None:
    config = TrainConfig(aggregator="fisher", options={"words": 3}, intervals=0)
    for run in ("a", "b"):
        train_run(store, config, tmp_path / run)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_what_can_be_learned_is_learned(tmp_path: Path) -> None:
    for task in ("multilabel", "multiclass"):
        bags = with_splits(make_bags(97, task=task))
        made = write_store(tmp_path / task, bags, make_features(bags), task=task)
        config = TrainConfig(aggregator="svm", options={"svm": "linear"}, intervals=0)
        assert train_run(made, config, tmp_path / f"{task}-run")["test"]["auc_macro"] > 0.95
        scores = predict_run(tmp_path / f"{task}-run", made, tmp_path / f"{task}-again")
        assert scores is not None
        assert scores["bags"] == 97


def test_labels_without_a_machine_are_warned_of_by_name(tmp_path: Path) -> None:
    bags = [replace(bag, labels=("actin",) if k % 2 else ()) for k, bag in enumerate(make_bags(61))]
    made = write_store(tmp_path / "s", bags, make_features(bags))
    warned: list[str] = []
    config = TrainConfig(aggregator="vlad", options={"c": 1}, intervals=0)
    train_run(made, config, tmp_path / "run", warn=warned.append)
    assert [w for w in warned if w.startswith("label 'golgi': 0 of ")]
    assert not [w for w in warned if "'actin'" in w]


def test_streamed_bags_give_the_model_of_bags_in_memory(store: Store, tmp_path: Path) -> None:
    config = TrainConfig(aggregator="vlad", options=OPTIONS["vlad"], intervals=0, tap="layer4")
    for run, memory in (("whole", "auto"), ("streamed", "9KB")):
        train_run(store, config.replace(memory=memory), tmp_path / run)
    first, second = (
        probabilities(tmp_path / run / "predictions.csv") for run in ("whole", "streamed")
    )
    np.testing.assert_allclose(first, second, rtol=1e-9)
    model, checkpoint = load_checkpoint(tmp_path / "streamed")
    assert isinstance(model, ClassicalModel)
    assert checkpoint.config.memory == "9000B"
    assert checkpoint.best_epoch is None
