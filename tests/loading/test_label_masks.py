"""Stage masks: which labels a bag can have, in losses, in predictions and in a run's folder."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_stores import LABELS, make_bags, make_features, with_splits, write_store

from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.loading.label_masks import possible_labels, read_stage_table
from dragn_cache.manifest import Bag
from dragn_cache.ragged import RaggedBags
from dragn_cache.runs.checkpoint import read_checkpoint
from dragn_cache.runs.predict import predict_run
from dragn_cache.runs.train import train_run
from dragn_cache.store import Store
from dragn_cache.training import train as training
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.objective import positive_weights
from dragn_cache.training.stacked import train_many
from dragn_cache.training.train import Trained, train

# actin in stage 4 only; golgi in 4 and 5; nucleus always.
TABLE = {"actin": ("4",), "golgi": ("4", "5")}
POSSIBLE = {"4": [1, 1, 1], "5": [0, 1, 1], "6": [0, 0, 1]}
CONFIG = TrainConfig(
    aggregator="mean", epochs=3, batch_size=8, lr=1e-2, dropout=0.0, intervals=0, seed=5
)
MASKED = CONFIG.replace(stage_mask="both", stages=TABLE)


def staged(bags: list[Bag]) -> list[Bag]:
    return [replace(bag, extra={"stage": "456"[k % 3]}) for k, bag in enumerate(bags)]


BAGS = staged(with_splits(make_bags(41)))


@pytest.fixture(scope="module")
def data() -> LabelledBags:
    features = make_features(BAGS)
    targets = np.array([[label in (bag.labels or ()) for label in LABELS] for bag in BAGS], np.int8)
    ragged = RaggedBags.from_list([torch.from_numpy(features[bag.bag_id]) for bag in BAGS])
    stages = {bag.bag_id: bag.extra["stage"] for bag in BAGS}
    possible = possible_labels(TABLE, stages, LABELS, "multilabel")
    splits = tuple(bag.split for bag in BAGS)
    return LabelledBags(ragged, targets, splits, "multilabel", possible=possible)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("s") / "s.features", BAGS, make_features(BAGS))


def test_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("label,stages\nactin,4\n golgi ,4; 5\n")
    assert read_stage_table(tmp_path / "t.csv") == TABLE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,stage\nactin,4\n", "expected the columns label and stages.* got label, stage"),
        ("label,stages\n", "got no row"),
        ("label,stages\nactin,\n", r"t.csv:2: expected a label, once.* got 'actin,'"),
        ("label,stages\n,4\n", r"t.csv:2: expected a label, once.* got ',4'"),
        ("label,stages\nactin,4\nactin,5\n", r"t.csv:3: .*got 'actin' again"),
    ],
)
def test_a_table_with_faults_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_stage_table(tmp_path / "t.csv")


def test_what_is_possible() -> None:
    stages = {"a": "6", "b": "4", "c": "5"}
    found = possible_labels(TABLE, stages, LABELS, "multilabel")
    assert found.astype(int).tolist() == [POSSIBLE["6"], POSSIBLE["4"], POSSIBLE["5"]]


@pytest.mark.parametrize(
    ("table", "stages", "task", "message"),
    [
        (TABLE, {"a": "4"}, "multiclass", "stage_mask: expected a multi-label task, got multic"),
        ({"actine": ("4",)}, {"a": "4"}, "multilabel", "did you mean actin"),
        (TABLE, {"a": "4", "b": ""}, "multilabel", "bag 'b': expected a stage .* got no stage"),
        (
            dict.fromkeys(LABELS, ("4",)),
            {"a": "4", "b": "04"},
            "multilabel",
            "bag 'b': expected a stage in which a label is possible, got stage '04'",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused(
    table: Any, stages: dict[str, str], task: Any, message: str
) -> None:
    with pytest.raises((InputError, UnknownNameError), match=message):
        possible_labels(table, stages, LABELS, task)


def test_impossible_labels_count_nothing_in_training(data: LabelledBags) -> None:
    """Whatever their targets are, in training and in validation."""
    assert data.possible is not None
    other = replace(data, targets=np.where(data.possible, data.targets, 1 - data.targets))
    for mask in ("train", "both"):
        config = MASKED.replace(stage_mask=mask)
        assert train(data, config).history == train(other, config).history
    for config in (CONFIG, MASKED.replace(stage_mask="predict")):
        assert train(data, config).history != train(other, config).history


def test_the_masked_loss_by_hand(data: LabelledBags) -> None:
    config = MASKED.replace(lr=0.0, epochs=1, loss="frn", loss_options={"anneal": 0})
    trained = train(data, config)
    weight = positive_weights(data, config, torch.device("cpu"))
    assert weight is not None
    rows = data.rows("validation")
    with torch.no_grad():
        z = trained.model(data.bags.select(torch.from_numpy(rows)))[0].double().numpy()
    p, y = 1 / (1 + np.exp(-z)), data.targets[rows]
    terms = -(weight.numpy() * y * np.log(p) + (1 - y) * np.log(1 - p))
    terms = (1 - np.exp(-terms)) ** 2 * terms
    possible = np.array([POSSIBLE[BAGS[row].extra["stage"]] for row in rows])
    expected = (terms * possible).sum() / terms.size
    assert trained.history[0]["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_impossible_labels_have_probability_0(data: LabelledBags) -> None:
    plain, trained = train(data, CONFIG), train(data, MASKED.replace(stage_mask="predict"))
    assert plain.history == trained.history
    np.testing.assert_array_equal(
        trained.probabilities, np.where(data.possible, plain.probabilities, 0)
    )
    unmasked = train(data, MASKED.replace(stage_mask="train"))
    assert (unmasked.probabilities > 0).all()


def test_a_plateau_watches_masked_predictions(
    data: LabelledBags, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = []

    def noting(targets: Any, p: Any, **settings: Any) -> dict[str, float]:
        watched.append(p)
        return {"f1_macro": 0.5}

    monkeypatch.setattr(training, "evaluate", noting)
    options = {"schedule": "plateau", "schedule_options": {"monitor": "f1_macro"}}
    for mask, hidden in (("predict", True), ("train", False)):
        train(data, MASKED.replace(stage_mask=mask, epochs=1, **options))
        possible = np.array([POSSIBLE[b.extra["stage"]] for b in BAGS if b.split == "validation"])
        assert np.array_equal(watched[-1] > 0, possible == 1) == hidden


def test_many_models_are_masked_alike(data: LabelledBags) -> None:
    configs = [MASKED.replace(shuffle_seed=1, seed=k, pos_weight=w) for k, w in ((1, None), (2, 3))]
    for config, ours in zip(configs, train_many(data, configs), strict=True):
        single = train(data, config)
        assert isinstance(ours, Trained)
        np.testing.assert_allclose(ours.probabilities, single.probabilities, atol=1e-6)
        assert ours.history[-1] == pytest.approx(single.history[-1], rel=1e-5)


def test_a_mask_without_stages_is_refused(data: LabelledBags) -> None:
    with pytest.raises(InputError, match=r"^stage_mask: expected bags with the labels that"):
        train(replace(data, possible=None), MASKED)
    with pytest.raises(InputError, match=r"^stage_mask: expected `stages` as well, got none"):
        CONFIG.replace(stage_mask="both")
    with pytest.raises(InputError, match=r"^stages: expected `stage_mask` as well, got none"):
        CONFIG.replace(stages=TABLE)
    with pytest.raises(InputError, match=r"^stage_mask: expected train, predict or both, got"):
        MASKED.replace(stage_mask="test")  # type: ignore[arg-type]


# --- runs --------------------------------------------------------------------------------------


def probabilities(path: Path) -> dict[str, list[float]]:
    with path.open(newline="") as file:
        return {
            row["bag_id"]: [float(row[f"p_{label}"]) for label in LABELS]
            for row in csv.DictReader(file)
        }


def test_a_run_remembers_its_mask(store: Store, tmp_path: Path) -> None:
    train_run(store, MASKED, tmp_path / "run")
    found = probabilities(tmp_path / "run" / "predictions.csv")
    for bag in BAGS:
        assert [p > 0 for p in found[bag.bag_id]] == [bool(k) for k in POSSIBLE[bag.extra["stage"]]]
    assert read_checkpoint(tmp_path / "run").config.stages == TABLE
    predict_run(tmp_path / "run", store, tmp_path / "again")
    assert probabilities(tmp_path / "again" / "predictions.csv") == found


def test_another_table_of_bags_may_have_the_stages(store: Store, tmp_path: Path) -> None:
    train_run(store, MASKED, tmp_path / "run")
    table = tmp_path / "bags.csv"
    lines = [f"{bag.bag_id},{';'.join(bag.labels or ())},6" for bag in BAGS]
    table.write_text("\n".join(["bag_id,labels,stage", *lines, ""]))
    predict_run(tmp_path / "run", store, tmp_path / "out", bags_csv=table)
    found = probabilities(tmp_path / "out" / "predictions.csv")
    assert all([p > 0 for p in row] == [False, False, True] for row in found.values())


def test_a_store_without_stages_is_refused(tmp_path: Path) -> None:
    bags = with_splits(make_bags(41))
    plain = write_store(tmp_path / "plain.features", bags, make_features(bags))
    with pytest.raises(
        InputError, match=r"bag '000': .*got no stage; give bags.csv a stage column"
    ):
        train_run(plain, MASKED, tmp_path / "run")
