"""Training: what the seed fixes, which epoch is kept, and what may not touch the model."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from own_aggregators import Doubling
from run_stores import LABELS, make_bags, make_features, with_splits

from dragn_cache.aggregators.si import Si
from dragn_cache.errors import DragnCacheError, InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.criteria import bce
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.fit import fit_method
from dragn_cache.training.losses import Frn
from dragn_cache.training.model import build_model, predict
from dragn_cache.training.objective import positive_weights
from dragn_cache.training.stacked import train_many
from dragn_cache.training.start import start_at
from dragn_cache.training.train import Trained, train

CONFIG = TrainConfig(
    aggregator="dragn", options={"unit": "L1Agg"}, epochs=3, batch_size=8, lr=1e-2, dropout=0.0
)


@pytest.fixture(scope="module")
def data() -> LabelledBags:
    bags = with_splits(make_bags(41))
    features = make_features(bags)
    targets = np.array([[label in (bag.labels or ()) for label in LABELS] for bag in bags], np.int8)
    ragged = RaggedBags.from_list([torch.from_numpy(features[bag.bag_id]) for bag in bags])
    return LabelledBags(ragged, targets, tuple(bag.split for bag in bags), "multilabel")


def weights(trained: Trained) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trained.model.parameters())


def changed(data: LabelledBags, split: str) -> LabelledBags:
    """Other features and the opposite labels for the bags of one split."""
    rows = data.rows(split)
    values, targets = data.bags.values.clone(), data.targets.copy()
    for row in rows:
        start, end = data.bags.offsets[row : row + 2].tolist()
        values[start:end] = 5 - 2 * values[start:end]
    targets[rows] = 1 - targets[rows]
    return replace(data, bags=RaggedBags(values, data.bags.offsets), targets=targets)


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_one_alone(
    data: LabelledBags,
) -> None:
    config = CONFIG.replace(dropout=0.3)
    torch.manual_seed(11)
    first = train(data, config)
    drawn = torch.rand(3)
    torch.manual_seed(12)
    second = train(data, config)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(weights(first), weights(second))
    assert first.history == second.history
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    assert not torch.equal(weights(train(data, config.replace(seed=1))), weights(first))


def test_the_shuffle_seed_is_of_the_order_alone(data: LabelledBags) -> None:
    same = train(data, CONFIG.replace(shuffle_seed=CONFIG.seed))
    assert same.history == train(data, CONFIG).history
    other = train(data, CONFIG.replace(shuffle_seed=5))
    assert other.history != same.history
    # In batches that hold everything, order matters to nothing but rounding for the mean.
    whole = CONFIG.replace(aggregator="mean", options={}, batch_size=100, dropout=0.0)
    for row, expected in zip(
        train(data, whole.replace(shuffle_seed=5)).history, train(data, whole).history, strict=True
    ):
        assert row == pytest.approx(expected, rel=1e-5)


def test_balanced_weights_count_the_training_bags(data: LabelledBags) -> None:
    targets = data.targets.copy()
    training = data.rows("train")
    targets[training] = 0
    targets[training[:3], 0] = 1
    targets[training, 1] = 1
    changed_data = replace(data, targets=targets)
    got = positive_weights(changed_data, CONFIG.replace(pos_weight="balanced"), torch.device("cpu"))
    count = len(training)
    assert got is not None
    assert got.tolist() == pytest.approx([(count - 3) / 3, 0, count])
    got = positive_weights(changed_data, CONFIG.replace(pos_weight=2), torch.device("cpu"))
    assert got is not None
    assert got.tolist() == [2, 2, 2]
    assert positive_weights(changed_data, CONFIG, torch.device("cpu")) is None


def test_heavier_positives_raise_probabilities(data: LabelledBags) -> None:
    config = CONFIG.replace(epochs=12)
    plain, heavy = train(data, config), train(data, config.replace(pos_weight=9.0))
    assert heavy.probabilities.mean() > plain.probabilities.mean() + 0.1


def test_positives_have_no_weight_where_classes_exclude_each_other(data: LabelledBags) -> None:
    with pytest.raises(InputError, match=r"^pos_weight: expected a multi-label task, got multicl"):
        train(replace(data, task="multiclass"), CONFIG.replace(pos_weight=2.0))


def test_instances_are_shuffled_for_methods_that_see_their_order(data: LabelledBags) -> None:
    for method, sees_order in (("dragn", True), ("mean", False)):
        config = CONFIG.replace(aggregator=method, options={})
        shuffled = train(data, config)
        kept = train(data, config.replace(order="manifest"))
        assert (shuffled.history != kept.history) == sees_order


def test_the_epoch_of_lowest_validation_loss_is_kept(data: LabelledBags) -> None:
    rng = np.random.default_rng(3)
    noise = replace(data, targets=rng.integers(0, 2, data.targets.shape).astype(np.int8))
    rows: list[dict[str, float]] = []
    config = CONFIG.replace(epochs=23, lr=3e-2)
    trained = train(noise, config, progress=rows.append)
    losses = [row["validation_loss"] for row in trained.history]
    assert [row["epoch"] for row in trained.history] == list(range(1, 24))
    assert rows == list(trained.history)
    assert trained.best_epoch == 1 + int(np.argmin(losses))
    assert 1 < trained.best_epoch < 23  # else this would hold for the last epoch's weights too
    rows = torch.from_numpy(noise.rows("validation"))
    with torch.no_grad():
        logits = trained.model(noise.bags.select(rows))[0]
    assert bce(logits, torch.from_numpy(noise.targets)[rows]).item() == min(losses)
    expected = predict(trained.model, noise.bags, noise.task)
    np.testing.assert_array_equal(trained.probabilities, expected)
    assert not trained.model.training


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_test_bags_never_touch_training(
    data: LabelledBags, scale: Literal["none", "standard"]
) -> None:
    config = CONFIG.replace(scale=scale)
    first, second = train(data, config), train(changed(data, "test"), config)
    assert first.history == second.history
    assert all(
        map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values())
    )
    test = data.rows("test")
    assert (first.probabilities[test] != second.probabilities[test]).any(axis=1).all()


@pytest.mark.parametrize("scale", ["none", "standard"])
def test_validation_bags_choose_the_epoch_and_no_more(
    data: LabelledBags, scale: Literal["none", "standard"]
) -> None:
    config = CONFIG.replace(scale=scale)
    first, second = train(data, config), train(changed(data, "validation"), config)
    for name, same in (("train_loss", True), ("validation_loss", False)):
        assert ([r[name] for r in first.history] == [r[name] for r in second.history]) == same


def test_evaluation_does_not_depend_on_its_batches(
    data: LabelledBags, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(CONFIG, data.bags.in_shape, 3).eval()
    whole = predict(model, data.bags, data.task)
    one_by_one = [predict(model, data.bags.select([k]), data.task)[0] for k in range(41)]
    for rows in (1, 5, 13):
        monkeypatch.setattr("dragn_cache.loading.feeds.EVALUATION_ROWS", rows)
        np.testing.assert_allclose(predict(model, data.bags, data.task), whole, rtol=1e-6)
    np.testing.assert_allclose(whole, one_by_one, rtol=1e-6)


def test_instances_are_in_the_manifests_order_at_evaluation(data: LabelledBags) -> None:
    config = CONFIG.replace(options={"unit": "L1Agg", "init": "default"})
    model = build_model(config, data.bags.in_shape, 3)
    offsets = data.bags.offsets.tolist()
    backwards = [k for a, b in pairwise(offsets) for k in range(b - 1, a - 1, -1)]
    reversed_ = RaggedBags(data.bags.values[backwards], data.bags.offsets)
    assert not np.allclose(
        predict(model, data.bags, data.task), predict(model, reversed_, data.task)
    )
    np.testing.assert_array_equal(
        predict(model, data.bags, data.task), predict(model, data.bags, data.task)
    )


def test_probabilities_are_sigmoids_or_a_softmax(data: LabelledBags) -> None:
    model = build_model(CONFIG.replace(aggregator="mean", options={}), data.bags.in_shape, 3)
    model.eval()
    with torch.no_grad():
        logits = model(data.bags)[0].double().numpy()
    np.testing.assert_allclose(
        predict(model, data.bags, "multilabel"), 1 / (1 + np.exp(-logits)), rtol=1e-12
    )
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(predict(model, data.bags, "multiclass"), expected, rtol=1e-12)


def test_a_loss_that_is_not_finite_ends_training(data: LabelledBags) -> None:
    values = data.bags.values.clone()
    values[int(data.bags.offsets[data.rows("train")[0]])] = torch.inf
    broken = replace(data, bags=RaggedBags(values, data.bags.offsets))
    message = r"^epoch 1: expected a finite loss, got training nan, .*lower `lr` \(now 0\.01\)"
    with pytest.raises(DragnCacheError, match=message):
        train(broken, CONFIG)


def test_a_learning_rate_too_high_ends_in_that_error(data: LabelledBags) -> None:
    config = CONFIG.replace(aggregator="mean", options={}, lr=1e3, weight_decay=1e3, epochs=60)
    with pytest.raises(DragnCacheError, match=r"expected a finite loss.*\(now 1000\)"):
        train(data, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
        ({"intervals": -1}, "intervals: expected a whole number of at least 0, got -1"),
        ({"seed": -1}, "seed: expected a whole number from 0 to 9223372036854775807, got -1"),
        (
            {"shuffle_seed": -2},
            "shuffle_seed: expected a whole number from 0 to 9223372036854775807, got -2",
        ),
        (
            {"pos_weight": -1.0},
            "pos_weight: expected a number from 0 to 1000000 or balanced, got -1.0",
        ),
        (
            {"pos_weight": "even"},
            "pos_weight: expected a number from 0 to 1000000 or balanced, got 'even'",
        ),
        ({"scale": "max"}, "scale: expected none or standard, got 'max'"),
        ({"order": "sorted"}, "order: expected random or manifest, got 'sorted'"),
        ({"lr": float("nan")}, "lr: expected a number from 0 to 1000, got nan"),
        ({"weight_decay": -1.0}, "weight_decay: expected a number from 0 to 1000, got -1.0"),
        ({"dropout": 1.0}, "dropout: expected a number from 0 to 0.999, got 1.0"),
        ({"optimizer": "lion"}, "optimizer: expected adamw, adam or sgd, got 'lion'"),
        ({"momentum": 1.0}, "momentum: expected a number from 0 to 0.999, got 1.0"),
        ({"momentum": 0.5}, "momentum: expected `optimizer=sgd`, .* got adamw; leave it out"),
        ({"schedule": "poly"}, "schedule: expected none, plateau, cosine or step, got 'poly"),
        ({"patience": -1}, "patience: expected a whole number of at least 0, got -1"),
        ({"keep": "first"}, "keep: expected best or last, got 'first'"),
        (
            {"keep": "last", "patience": 2},
            "patience: expected 0 with `keep=last`: .* got 2; leave one",
        ),
    ],
)
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        CONFIG.replace(**change)


def test_labels_that_training_bags_cannot_teach_are_told(data: LabelledBags) -> None:
    training = data.rows("train")
    targets = data.targets.copy()
    targets[training, 0], targets[training, 2] = 0, 1
    told: list[str] = []
    names = ["label0", "label1", "label2"]
    fit_method(replace(data, targets=targets), CONFIG, labels=names, warn=told.append)
    assert told[0].startswith("no training bag has label0: ")
    assert told[1].startswith("all training bags have label2: ")
    assert len(told) == 2


# --- losses, optimisers, schedules -------------------------------------------------------------


def test_frn_is_balanced_unless_told_otherwise(data: LabelledBags) -> None:
    balanced = CONFIG.replace(loss="frn", pos_weight="balanced")
    assert train(data, CONFIG.replace(loss="frn")).history == train(data, balanced).history
    assert train(data, balanced.replace(pos_weight=1.0)).history != train(data, balanced).history
    plain = train(data, CONFIG.replace(loss="weighted_bce")).history
    assert plain == train(data, CONFIG.replace(pos_weight="balanced")).history


def test_validation_is_measured_as_in_the_last_epoch(data: LabelledBags) -> None:
    """A rate of 0 leaves the model alone: what changes by epoch is the training loss only."""
    config = CONFIG.replace(loss="frn", lr=0.0, order="manifest", epochs=13)
    trained = train(data, config)
    history = trained.history
    assert len({row["validation_loss"] for row in history}) == 1
    losses = [row["train_loss"] for row in history]
    assert all(a > b for a, b in pairwise(losses[:11]))  # the focus takes from every entry
    assert losses[10] == pytest.approx(losses[12], rel=1e-5)
    torch.manual_seed(config.seed)
    model = build_model(config, data.bags.in_shape, 3).eval()
    rows = torch.from_numpy(data.rows("validation"))
    weight = positive_weights(data, config, torch.device("cpu"))
    assert weight is not None
    start_at(model, trained.model.head.bias.detach())
    with torch.no_grad():
        z = model(data.bags.select(rows))[0].double()
    y = torch.from_numpy(data.targets)[rows]
    terms = weight * y * (1 + (-z).exp()).log() + (1 - y) * (1 + z.exp()).log()
    expected = ((1 - (-terms).exp()) ** 2 * terms).mean()
    assert history[0]["validation_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_reaches_the_losses_of_aggregators(
    data: LabelledBags, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(Doubling, "criteria", given)
    config = CONFIG.replace(aggregator="own_aggregators:Doubling", options={}, loss="frn", epochs=2)
    train(data, config)
    focus = [criterion.keywords["gamma"] for criterion in given]
    assert focus == [1.0] * 3 + [Frn().focus(2)] * 3


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_each_optimiser_learns(data: LabelledBags, optimizer: Any) -> None:
    config = CONFIG.replace(optimizer=optimizer, epochs=5, weight_decay=0.0)
    losses = [row["train_loss"] for row in train(data, config).history]
    assert losses[-1] < losses[0]


def test_the_rates_of_the_epochs_are_in_the_history(data: LabelledBags) -> None:
    config = CONFIG.replace(schedule="step", schedule_options={"milestones": 2}, lr=0.5)
    assert [row["lr"] for row in train(data, config).history] == pytest.approx([0.5, 0.5, 0.05])
    assert [row["lr"] for row in train(data, CONFIG).history] == [1e-2] * 3


def test_a_plateau_of_macro_f1_lowers_the_rate(data: LabelledBags) -> None:
    """The model stands still, so its score does; a decision of every label has an F1 above 0."""
    for monitor in ("f1_macro", "loss"):
        config = CONFIG.replace(
            lr=1e-12,
            epochs=5,
            schedule="plateau",
            schedule_options={"monitor": monitor, "patience": 1, "factor": 0.5},
        )
        rates = [row["lr"] for row in train(data, config).history]
        assert rates == pytest.approx([1e-12] * 3 + [5e-13] * 2, rel=1e-6)


def test_training_stops_when_validation_has_not_improved(data: LabelledBags) -> None:
    rng = np.random.default_rng(3)
    noise = replace(data, targets=rng.integers(0, 2, data.targets.shape).astype(np.int8))
    whole = train(noise, CONFIG.replace(epochs=23, lr=3e-2))
    for patience in (1, 3):
        stopped = train(noise, CONFIG.replace(epochs=23, lr=3e-2, patience=patience))
        count = len(stopped.history)
        assert stopped.history == whole.history[:count]
        assert count == stopped.best_epoch + patience < 23


def test_the_last_epoch_can_be_kept(data: LabelledBags) -> None:
    rng = np.random.default_rng(4)
    noise = replace(data, targets=rng.integers(0, 2, data.targets.shape).astype(np.int8))
    config = CONFIG.replace(epochs=7, lr=3e-2)
    best, last = train(noise, config), train(noise, config.replace(keep="last"))
    assert best.best_epoch < last.best_epoch == 7
    assert best.history == last.history
    stopped = train(noise, config.replace(epochs=best.best_epoch, keep="last"))
    assert np.array_equal(stopped.probabilities, best.probabilities)
    (grouped,) = train_many(noise, [config.replace(keep="last")])
    assert isinstance(grouped, Trained)
    assert grouped.best_epoch == 7
    np.testing.assert_allclose(grouped.probabilities, last.probabilities, atol=1e-4)


def test_an_aggregator_is_told_the_task(data: LabelledBags) -> None:
    classes = replace(data, targets=np.eye(3, dtype=np.int8)[data.targets.argmax(1)])
    classes = replace(classes, task="multiclass")
    config = TrainConfig(aggregator="si", epochs=2, dropout=0.0)
    trained = train(classes, config)
    assert cast(Si, trained.model.aggregator).options.task == "multiclass"
    assert cast(Si, train(data, config).model.aggregator).options.task == "multilabel"
    np.testing.assert_allclose(trained.probabilities.sum(1), 1)
