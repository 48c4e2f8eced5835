"""Runs: one seed one folder, every bag accounted for, and no model on features not its own."""

from __future__ import annotations

import csv
import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch
from run_stores import LABELS, Features, make_bags, make_features, with_splits, write_store
from sklearn.metrics import f1_score, roc_auc_score

from dragn_cache.errors import (
    InputError,
    ManifestError,
    SettingError,
    StoreError,
    StoreMismatchError,
    UnknownNameError,
)
from dragn_cache.loading.labelling import read_labelling
from dragn_cache.manifest import Bag, write_bags
from dragn_cache.runs.checkpoint import load_checkpoint, read_checkpoint, write_checkpoint
from dragn_cache.runs.config import ApplyConfig
from dragn_cache.runs.evaluate import evaluate_run
from dragn_cache.runs.folder import run_name
from dragn_cache.runs.predict import predict_run
from dragn_cache.runs.train import train_run
from dragn_cache.store import Store
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import choose_tap, warn_vectors

CONFIG = TrainConfig(
    aggregator="mean", epochs=3, batch_size=8, lr=3e-2, dropout=0.0, intervals=0, seed=5
)
FILES = [
    "SHA256SUMS",
    "checkpoint.pt",
    "config.toml",
    "history.csv",
    "metrics.json",
    "predictions.csv",
    "splits.csv",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """101 bags with groups and without splits."""
    bags = make_bags(101)
    return write_store(tmp_path_factory.mktemp("s") / "made.features", bags, make_features(bags))


@pytest.fixture(scope="module")
def split_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """53 bags with the manifest's own splits."""
    bags = with_splits(make_bags(53))
    return write_store(tmp_path_factory.mktemp("s") / "split.features", bags, make_features(bags))


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("r") / "run"
    train_run(store, CONFIG, out)
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str) -> list[str]:
    return [row[name] for row in rows_of(path)]


def bags_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- what a run is -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "dropout"), [("mean", {}, 0.3), ("dragn", {"unit": "L2Agg"}, 0.0)]
)
def test_the_same_seed_gives_the_same_bytes(
    store: Store, tmp_path: Path, method: str, options: dict[str, Any], dropout: float
) -> None:
    config = CONFIG.replace(
        aggregator=method, options=options, dropout=dropout, epochs=2, intervals=20
    )
    train_run(store, config, tmp_path / "a")
    train_run(store, config, tmp_path / "deep" / "b")
    train_run(store, config.replace(seed=6), tmp_path / "c")
    for name in FILES:
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "deep" / "b" / name).read_bytes(), name
        assert first != (tmp_path / "c" / name).read_bytes(), name


def test_a_run_folder_holds_these_files_and_no_others(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == FILES


@pytest.mark.parametrize(
    ("method", "options"),
    [("mean", {}), ("max", {}), ("dragn", {"unit": "L1Agg"}), ("dragn", {"unit": "L3Agg"})],
)
def test_what_can_be_learned_is_learned(
    store: Store, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    config = CONFIG.replace(aggregator=method, options=options, epochs=40, lr=1e-2)
    metrics = train_run(store, config, tmp_path / "run")
    assert metrics["test"]["auc_macro"] > 0.95
    assert metrics["test"]["f1_macro"] > 0.8


def test_metrics_are_scores_for_each_split(store: Store, tmp_path: Path) -> None:
    metrics = train_run(store, CONFIG.replace(intervals=30), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert list(metrics) == ["train", "validation", "test"]
    named = {
        "auc_macro", "f1_macro", "f1_micro", "precision_macro", "recall_macro", "sensitivity",
        "specificity", "f1_samples", "auc_samples", "map", "accuracy", "labels_undefined",
    }  # fmt: skip
    for scores in metrics.values():
        assert named <= scores.keys()
        low, high = scores["intervals"]["auc_macro"]
        assert low <= scores["auc_macro"] <= high


def test_predictions_list_every_bag_and_give_the_scores(store: Store, run: Path) -> None:
    rows = rows_of(run / "predictions.csv")
    y_columns, p_columns, d_columns = ([f"{kind}_{label}" for label in LABELS] for kind in "ypd")
    assert list(rows[0]) == ["bag_id", "split", *y_columns, *p_columns, *d_columns]
    assert [row["bag_id"] for row in rows] == store.bag_ids
    for row, bag in zip(rows, store.bags, strict=True):
        assert [row[c] for c in y_columns] == [str(int(label in bag.labels)) for label in LABELS]
    metrics = json.loads((run / "metrics.json").read_text())
    for split, scores in metrics.items():
        chosen = [row for row in rows if row["split"] == split]
        y = np.array([[int(row[c]) for c in y_columns] for row in chosen])
        p = np.array([[float(row[c]) for c in p_columns] for row in chosen])
        assert scores["bags"] == len(chosen)
        assert scores["auc_macro"] == pytest.approx(roc_auc_score(y, p, average="macro"))
        decided = p >= np.minimum(0.5, p.max(1, keepdims=True))
        assert [[int(row[c]) for c in d_columns] for row in chosen] == decided.astype(int).tolist()
        assert scores["f1_micro"] == pytest.approx(f1_score(y, decided, average="micro"))


def test_the_run_says_how_it_was_made(store: Store, run: Path) -> None:
    record = tomllib.loads((run / "config.toml").read_text())
    assert record["train"]["aggregator"] == "mean"
    assert record["train"]["tap"] == "gap"
    assert record["train"]["seed"] == 5
    assert record["data"]["labels"] == list(LABELS)
    assert record["data"]["features"] == store.description.digest("features")
    history = rows_of(run / "history.csv")
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    assert list(history[0]) == ["epoch", "lr", "train_loss", "validation_loss"]


def test_the_checkpoint_is_the_epoch_of_lowest_validation_loss(
    tmp_path: Path,
) -> None:
    bags = with_splits(make_bags(53, seed=1))
    noise = write_store(tmp_path / "s", bags, make_features(make_bags(53, seed=2)))
    train_run(noise, CONFIG.replace(epochs=29, lr=1e-2), tmp_path / "run")
    losses = [float(x) for x in column(tmp_path / "run" / "history.csv", "validation_loss")]
    model, checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.best_epoch == 1 + int(np.argmin(losses))
    assert 1 < checkpoint.best_epoch < 29
    # The loss over the validation bags once more, from the file's weights and plain arithmetic.
    total = 0.0
    weight, bias = (p.detach().double().numpy() for p in model.head.parameters())
    validation = [bag for bag in noise.bags if bag.split == "validation"]
    for bag in validation:
        logits = weight @ noise.bag(bag.bag_id, "gap").mean(0, dtype=np.float64) + bias
        y = np.array([label in bag.labels for label in LABELS])
        total += np.log1p(np.exp(np.where(y, -logits, logits))).mean()
    assert total / len(validation) == pytest.approx(min(losses), rel=1e-5)


def test_settings_of_training_are_recorded_and_read_again(store: Store, tmp_path: Path) -> None:
    config = CONFIG.replace(
        loss="frn",
        loss_options={"gamma": 1.5, "temper": 10},
        optimizer="sgd",
        momentum=0.7,
        schedule="step",
        schedule_options={"milestones": (1, 2)},
        patience=7,
    )
    train_run(store, config, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run").config == config.replace(tap="gap")
    written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["train"]
    again = TrainConfig(**written)
    for name in ("loss", "loss_options", "optimizer", "momentum", "schedule", "patience"):
        assert getattr(again, name) == getattr(config, name), name
    train_run(store, again, tmp_path / "again")
    for name in FILES:
        if name not in ("SHA256SUMS", "config.toml", "checkpoint.pt"):  # lists there, tuples here
            first = (tmp_path / "run" / name).read_bytes()
            assert first == (tmp_path / "again" / name).read_bytes(), name
    rates = [float(rate) for rate in column(tmp_path / "run" / "history.csv", "lr")]
    assert rates == pytest.approx([3e-2, 3e-3, 3e-4])


def test_checkpoints_of_before_these_settings_are_read(
    store: Store, run: Path, tmp_path: Path
) -> None:
    record = torch.load(run / "checkpoint.pt", weights_only=True)
    for name in (
        "loss", "loss_options", "optimizer", "momentum", "schedule", "schedule_options", "patience",
        "stage_mask", "stages",
    ):  # fmt: skip
        del record["config"][name]
    (tmp_path / "old").mkdir()
    torch.save(record, tmp_path / "old" / "checkpoint.pt")
    for folder in (run, tmp_path / "old"):
        predict_run(folder, store, tmp_path / f"p-{folder.name}")
    first, second = (tmp_path / name / "predictions.csv" for name in ("p-run", "p-old"))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_is_named_after_its_store_method_and_seed() -> None:
    config = TrainConfig(options={"unit": "L1Agg", "init": "default"}, seed=7)
    name = run_name(Path("x/hpa.features"), config)
    assert name == "hpa-dragn-L1Agg-init=default-s7"
    assert run_name(Path("hpa"), config.replace(aggregator="max", options={})) == "hpa-max-s7"
    config = config.replace(aggregator="abmil", options={"embed": (23, 11), "attn_dim": 7})
    assert run_name(Path("hpa"), config) == "hpa-abmil-embed=23,11-attn_dim=7-s7"


def test_a_folder_with_files_is_refused(store: Store, run: Path, tmp_path: Path) -> None:
    before = (run / "metrics.json").read_bytes()
    for refused in (
        lambda: train_run(store, CONFIG, run),
        lambda: predict_run(run, store, run),
    ):
        with pytest.raises(
            InputError, match="run: expected a new folder, got one with files; give"
        ):
            refused()
    assert (run / "metrics.json").read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a new folder, got a file"):
        train_run(store, CONFIG, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert train_run(store, CONFIG.replace(epochs=1), tmp_path / "empty")["test"]["bags"] > 0


def test_a_store_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    bags = make_bags(61)
    path = tmp_path / "s"
    part = write_store(path, bags, make_features(bags), parts_written=1)
    with pytest.raises(StoreError, match=r"expected 3 parts, got 1; run the same extract command"):
        train_run(part, CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- which tap ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "tap", "chosen"),
    [
        ("dragn", None, "layer4"),
        ("mean", None, "gap"),
        ("max", None, "gap"),
        ("mean", "layer4", "layer4"),
        ("dragn", "gap", "gap"),
    ],
)
def test_methods_get_the_tap_they_need(
    store: Store, method: str, tap: str | None, chosen: str
) -> None:
    assert choose_tap(store, TrainConfig(aggregator=method, tap=tap)).name == chosen


def test_vectors_for_a_method_of_maps_are_told(store: Store) -> None:
    told: list[str] = []
    for method, tap in (("dragn", "layer4"), ("mean", "gap"), ("dragn", "gap")):
        warn_vectors(store.tap(tap), TrainConfig(aggregator=method), told.append)
    assert told == ["dragn is meant for maps: the vectors of gap are maps of a pixel"]


def test_unknown_names_are_offered_the_nearest(store: Store) -> None:
    with pytest.raises(UnknownNameError, match=r"aggregator: .*did you mean dragn"):
        choose_tap(store, TrainConfig(aggregator="dragon"))
    with pytest.raises(UnknownNameError, match=r"tap: .*did you mean layer4"):
        choose_tap(store, TrainConfig(tap="layer3"))


# --- splits ------------------------------------------------------------------------------------


def test_test_bags_never_influence_training(split_store: Store, tmp_path: Path) -> None:
    test = {bag.bag_id for bag in split_store.bags if bag.split == "test"}
    bags = [
        replace(bag, labels=tuple(set(LABELS) - set(bag.labels))) if bag.bag_id in test else bag
        for bag in split_store.bags
    ]
    features = {b.bag_id: split_store.bag(b.bag_id, "layer4") for b in bags}
    features |= {bag_id: 7 - features[bag_id] for bag_id in test}
    other = write_store(tmp_path / "other", bags, features)
    train_run(split_store, CONFIG, tmp_path / "a")
    train_run(other, CONFIG, tmp_path / "b")
    for name, same in (("history.csv", True), ("checkpoint.pt", True), ("metrics.json", False)):
        a, b = ((tmp_path / run / name).read_bytes() for run in "ab")
        assert (a == b) == same, name


def test_the_manifests_splits_are_honoured(split_store: Store, tmp_path: Path) -> None:
    train_run(split_store, CONFIG, tmp_path / "run")
    for name in ("splits.csv", "predictions.csv"):
        rows = rows_of(tmp_path / "run" / name)
        assert [(row["bag_id"], row["split"]) for row in rows] == [
            (bag.bag_id, bag.split) for bag in split_store.bags
        ]


def test_a_made_split_keeps_groups_whole_and_its_shares(store: Store, run: Path) -> None:
    rows = rows_of(run / "splits.csv")
    assert [(row["bag_id"], row["group"]) for row in rows] == [
        (bag.bag_id, bag.group) for bag in store.bags
    ]
    sides: dict[str, set[str]] = {}
    for row in rows:
        if row["group"]:
            sides.setdefault(row["group"], set()).add(row["split"])
    assert len(sides) == 34
    assert all(len(splits) == 1 for splits in sides.values())
    counts = {
        s: column(run / "splits.csv", "split").count(s) for s in ("train", "validation", "test")
    }
    for split, share in (("train", 0.4), ("validation", 0.1), ("test", 0.5)):
        assert abs(counts[split] - 101 * share) <= 3


def test_groups_that_straddle_are_refused(tmp_path: Path) -> None:
    bags = with_splits(make_bags(17))
    bags[0], bags[1] = replace(bags[0], group="twins"), replace(bags[1], group="twins")
    store = write_store(tmp_path / "s", bags, make_features(bags))
    message = r"group 'twins': expected all its bags in one split, got bags in train and in test"
    with pytest.raises(InputError, match=message):
        train_run(store, CONFIG, tmp_path / "run")


def test_a_split_for_some_bags_only_is_refused(split_store: Store, tmp_path: Path) -> None:
    text = "bag_id,split\n000,train\n001,test\n002,\n"
    message = r"b\.csv:4: expected a split for every bag, or for none, got none for bag '002'"
    with pytest.raises(InputError, match=message):
        train_run(
            split_store, CONFIG, tmp_path / "run", bags_csv=bags_csv(tmp_path / "b.csv", text)
        )


def test_a_split_without_bags_is_refused(split_store: Store, tmp_path: Path) -> None:
    text = "bag_id,split\n" + "".join(f"{k:03d},{('train', 'test')[k % 2]}\n" for k in range(9))
    with pytest.raises(InputError, match="got none in validation"):
        train_run(
            split_store, CONFIG, tmp_path / "run", bags_csv=bags_csv(tmp_path / "b.csv", text)
        )


# --- another table of labels -------------------------------------------------------------------


def test_another_table_replaces_labels_splits_and_groups(store: Store, tmp_path: Path) -> None:
    bags = with_splits(make_bags(101, seed=9))[:37][::-1]
    bags = [replace(bag, labels=tuple(f"new {label}" for label in bag.labels)) for bag in bags]
    write_bags(bags, tmp_path / "b.csv")
    train_run(store, CONFIG, tmp_path / "run", bags_csv=tmp_path / "b.csv")
    rows = rows_of(tmp_path / "run" / "predictions.csv")
    assert [(row["bag_id"], row["split"]) for row in rows] == [(b.bag_id, b.split) for b in bags]
    for row, bag in zip(rows, bags, strict=True):
        for label in LABELS:
            assert row[f"y_new {label}"] == str(int(f"new {label}" in bag.labels))
    assert read_checkpoint(tmp_path / "run").labels == tuple(f"new {label}" for label in LABELS)


def test_what_another_table_lacks_comes_from_the_store(split_store: Store, tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    of = {bag.bag_id: bag for bag in split_store.bags}
    labelling = read_labelling(split_store, bags_csv(path, "bag_id\n007\n003\n"))
    assert [(b.bag_id, b.labels, b.split) for b in labelling.bags] == [
        (bag_id, of[bag_id].labels, of[bag_id].split) for bag_id in ("007", "003")
    ]
    # Fewer labels than the store's keep the store's columns, so a model stays comparable.
    labelling = read_labelling(split_store, bags_csv(path, "bag_id,labels\n007,golgi\n003,\n"))
    assert labelling.labels == LABELS
    assert labelling.task == "multilabel"
    assert labelling.targets().tolist() == [[0, 1, 0], [0, 0, 0]]
    # A column is taken whole, never cell by cell: two splits must not be mixed.
    labelling = read_labelling(
        split_store, bags_csv(path, "bag_id,split,case_id\n007,test,\n003,,g\n")
    )
    assert [(b.split, b.group) for b in labelling.bags] == [("test", ""), ("", "g")]


def test_an_empty_column_of_splits_has_one_made(split_store: Store, tmp_path: Path) -> None:
    text = "bag_id,split\n" + "".join(f"{k:03d},\n" for k in range(53))
    train_run(split_store, CONFIG, tmp_path / "run", bags_csv=bags_csv(tmp_path / "b.csv", text))
    made = column(tmp_path / "run" / "splits.csv", "split")
    assert {name: made.count(name) for name in made} == {"train": 21, "validation": 5, "test": 27}
    assert made != [bag.split for bag in split_store.bags]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "bag_id,labels\n000,actin\n0O1,golgi\n",
            UnknownNameError,
            r"got '0O1'; did you mean 0\d1, .*otherwise correct b\.csv:3, or extract that bag",
        ),
        ("bag_id,labels\n000,actin\n000,actin\n", ManifestError, r"b\.csv:3: expected one row per"),
        ("bag_id,split\n000,trian\n", ManifestError, r"b\.csv:2: expected train, validation or"),
    ],
)
def test_faults_of_another_table(
    store: Store, tmp_path: Path, text: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train_run(store, CONFIG, tmp_path / "run", bags_csv=bags_csv(tmp_path / "b.csv", text))
    assert not (tmp_path / "run").exists()


def test_bags_without_labels_cannot_be_learned(tmp_path: Path) -> None:
    bags = [replace(bag, labels=None) for bag in make_bags(7)]
    store = write_store(tmp_path / "s", bags, make_features(bags))
    message = r"labels: expected a labels column, got none for bag '000'; give a table with bag_id,"
    with pytest.raises(InputError, match=message):
        train_run(store, CONFIG, tmp_path / "run")


# --- several classes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    bags = make_bags(89, task="multiclass")
    return write_store(
        tmp_path_factory.mktemp("s") / "classes", bags, make_features(bags), task="multiclass"
    )


def test_classes_are_learned_and_their_probabilities_add_up(classes: Store, tmp_path: Path) -> None:
    metrics = train_run(classes, CONFIG.replace(epochs=20), tmp_path / "run")
    assert metrics["test"]["auc_macro"] > 0.95
    rows = rows_of(tmp_path / "run" / "predictions.csv")
    p = np.array([[float(row[f"p_{label}"]) for label in LABELS] for row in rows])
    y = np.array([[int(row[f"y_{label}"]) for label in LABELS] for row in rows])
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)
    assert (y.sum(1) == 1).all()
    test = np.array([row["split"] == "test" for row in rows])
    right = (p.argmax(1) == y.argmax(1))[test].mean()
    assert metrics["test"]["accuracy"] == pytest.approx(right)


def test_two_classes_for_one_bag_are_refused_before_training(
    classes: Store, tmp_path: Path
) -> None:
    path = bags_csv(tmp_path / "b.csv", "bag_id,labels\n000,actin\n001,golgi;actin\n002,\n")
    message = r"b\.csv:3: expected exactly one label .* got 2 for bag '001'; .*\(and 1 more"
    with pytest.raises(ManifestError, match=message):
        train_run(classes, CONFIG, tmp_path / "run", bags_csv=path)


# --- bags that were lost -----------------------------------------------------------------------


def without_rows(bags: Sequence[Bag], features: Features, lost: Sequence[str]) -> Features:
    return {
        bag.bag_id: features[bag.bag_id][:0] if bag.bag_id in lost else features[bag.bag_id]
        for bag in bags
    }


def test_bags_without_a_usable_instance_are_left_out_and_told(tmp_path: Path) -> None:
    bags = with_splits(make_bags(31))
    features, lost = make_features(bags), ["000", "006", "007", "030"]
    with_lost = write_store(tmp_path / "s", bags, without_rows(bags, features, lost))
    kept = [bag for bag in bags if bag.bag_id not in lost]
    without = write_store(tmp_path / "t", kept, features)
    told: list[str] = []
    train_run(with_lost, CONFIG, tmp_path / "a", warn=told.append)
    assert told == ["4 bags have no usable instance and are left out: 000, 006, 007, 030"]
    train_run(without, CONFIG, tmp_path / "b", warn=told.append)
    assert len(told) == 1
    for name in ("predictions.csv", "metrics.json", "history.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bags_with_the_same_features_on_two_sides_are_told(tmp_path: Path) -> None:
    """Train 000 and test 001, validation 004 and test 003; train 002 and 005 are on one side."""
    bags = with_splits(make_bags(31))
    features = make_features(bags)
    for twin, bag in (("001", "000"), ("004", "003"), ("005", "002")):
        features[twin] = features[bag]
    told: list[str] = []
    train_run(write_store(tmp_path / "s", bags, features), CONFIG, tmp_path / "r", warn=told.append)
    assert told[:1] == [
        "bags with the same features on two sides of the split: '000' and '001', and 1 more such; "
        "give them one group"
    ]


def test_bags_with_the_same_images_on_two_sides_are_told(tmp_path: Path) -> None:
    """000 is trained on, 001 and 003 are tested, 002 is on the side of 000."""
    bags = with_splits(make_bags(31))
    digests = dict.fromkeys(("000", "001", "002", "003"), b"x" * 32) | {"005": b"y" * 32}
    told: list[str] = []
    store = write_store(tmp_path / "s", bags, make_features(bags), digests=digests)
    train_run(store, CONFIG, tmp_path / "r", warn=told.append)
    line = (
        "bags with the same images on two sides of the split: '000' and '001', and 1 more such; "
        "give them one group"
    )
    assert told == [line]
    test_bags = bags_csv(tmp_path / "t.csv", "bag_id\n001\n006\n008\n")
    told.clear()
    predict_run(tmp_path / "r", store, tmp_path / "p", bags_csv=test_bags, warn=told.append)
    assert told[0] == line.replace(", and 1 more such", "")


def test_names_that_mislead_are_told_before_training(tmp_path: Path) -> None:
    bags = [replace(bag, bag_id=f"{k:03d}") for k, bag in enumerate(with_splits(make_bags(31)))]
    bags[7] = replace(bags[7], bag_id="3")
    told: list[str] = []
    store = write_store(tmp_path / "s", bags, make_features(bags))
    train_run(store, CONFIG, tmp_path / "r", warn=told.append)
    (line,) = told
    assert line.startswith("bags.csv:9: look-alike-bag: ")
    assert "got '3' here and '003' at line 5, which differ by leading zeros" in line


def test_test_bags_of_one_class_are_told(tmp_path: Path) -> None:
    bags = with_splits(make_bags(53))
    bags = [replace(b, labels=("golgi",)) if b.split == "test" else b for b in bags]
    told: list[str] = []
    metrics = train_run(
        write_store(tmp_path / "s", bags, make_features(bags)),
        CONFIG.replace(intervals=100),
        tmp_path / "r",
        warn=told.append,
    )
    line = (
        "the 21 test bags have one class only of every label: AUC and mAP are undefined, accuracy "
        "and F1 tell nothing"
    )
    assert told == [line]
    assert metrics["test"]["map"] is metrics["test"]["intervals"]["map"] is None
    evaluate_run(tmp_path / "r", tmp_path / "e", warn=told.append)
    assert told == [line, line]


# --- a run on another store --------------------------------------------------------------------


def test_a_run_predicts_other_bags_of_the_same_features(
    store: Store, run: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    scores = predict_run(run, store, tmp_path / "same", warn=told.append)
    by_hand = {row["bag_id"]: row["p_golgi"] for row in rows_of(run / "predictions.csv")}
    again = {
        row["bag_id"]: row["p_golgi"] for row in rows_of(tmp_path / "same" / "predictions.csv")
    }
    assert again == by_hand
    seen = sum(row["split"] != "test" for row in rows_of(run / "predictions.csv"))
    assert told[-1] == (
        f"{seen} of these 101 bags were in the run's training or validation: score new ones, or "
        f"dragn-cache evaluate {run}"
    )
    assert scores is not None
    assert scores["bags"] == 101
    assert json.loads((tmp_path / "same" / "metrics.json").read_text()) == {"all": scores}


def test_a_runs_scaling_travels_with_it(store: Store, tmp_path: Path) -> None:
    train_run(store, CONFIG.replace(scale="standard"), tmp_path / "run")
    predict_run(tmp_path / "run", store, tmp_path / "out")
    first, again = (rows_of(tmp_path / name / "predictions.csv") for name in ("run", "out"))
    assert [row["p_golgi"] for row in first] == [row["p_golgi"] for row in again]


def test_bags_without_labels_are_predicted_and_not_scored(
    store: Store, run: Path, tmp_path: Path
) -> None:
    bags = [replace(bag, labels=None, split="test", group="") for bag in store.bags[:11]]
    features = {bag.bag_id: store.bag(bag.bag_id, "layer4") for bag in bags}
    new = write_store(tmp_path / "new", bags, features)
    assert predict_run(run, new, tmp_path / "out") is None
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["SHA256SUMS", "predictions.csv"]
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [row["y_actin"] for row in rows] == [""] * 11
    assert [row["split"] for row in rows] == ["test"] * 11
    for got, first in zip(rows, rows_of(run / "predictions.csv"), strict=False):
        assert float(got["p_actin"]) == pytest.approx(float(first["p_actin"]), rel=1e-6)


def test_a_label_that_looks_like_one_of_the_runs_is_told(run: Path, tmp_path: Path) -> None:
    bags = make_bags(7)
    written = write_store(tmp_path / "new", bags, make_features(bags))
    for table in (written.path / "manifest").iterdir():
        table.write_text(table.read_text().replace("golgi", "Golgi"))
    told: list[str] = []
    assert predict_run(run, Store(written.path), tmp_path / "out", warn=told.append) is None
    assert (
        "the run does not know the store's label 'Golgi', perhaps 'golgi' (they differ by case): "
        "predictions without scores"
    ) in told


def test_a_subset_with_other_labels_is_scored_by_them(
    store: Store, run: Path, tmp_path: Path
) -> None:
    path = bags_csv(tmp_path / "b.csv", "bag_id,labels\n003,golgi\n001,\n")
    scores = predict_run(run, store, tmp_path / "out", bags_csv=path)
    assert scores is not None
    assert scores["bags"] == 2
    rows = rows_of(tmp_path / "out" / "predictions.csv")
    assert [(row["bag_id"], row["y_golgi"]) for row in rows] == [("003", "1"), ("001", "0")]
    bags_csv(path, "bag_id,labels\n003,golgy\n")
    with pytest.raises(ManifestError, match=r"b\.csv:2: expected a known label, got 'golgy'; did"):
        predict_run(run, store, tmp_path / "other", bags_csv=path)


@pytest.fixture
def small(tmp_path: Path) -> tuple[list[Bag], Features]:
    bags = make_bags(5)
    return bags, make_features(bags)


def test_other_features_are_refused_by_name(
    run: Path, tmp_path: Path, small: tuple[list[Bag], Features]
) -> None:
    settings = {"features": {"size": [59, 61], "grid": 4}}
    other = write_store(tmp_path / "o.features", *small, provenance=settings)
    message = (
        r"o\.features: expected the features that run was trained on, got features\.grid is absent,"
        r" asked for 4 · features\.size is \[41, 53\], asked for \[59, 61\]; extract these images"
    )
    with pytest.raises(StoreMismatchError, match=message):
        predict_run(run, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_numerics_are_told(
    run: Path, tmp_path: Path, small: tuple[list[Bag], Features]
) -> None:
    other = write_store(
        tmp_path / "o", *small, provenance={"numerics": {"batch_size": 8}, "plan": {"x": 1}}
    )
    told: list[str] = []
    predict_run(run, other, tmp_path / "out", warn=told.append)
    assert told[0] == (
        "the features were computed slightly differently: numerics.batch_size is 4, asked for 8"
    )


def test_an_incomplete_store_is_not_predicted(run: Path, tmp_path: Path) -> None:
    bags = make_bags(61)
    other = write_store(tmp_path / "o", bags, make_features(bags), parts_written=2)
    with pytest.raises(StoreError, match="expected 3 parts, got 2"):
        predict_run(run, other, tmp_path / "out")


# --- checkpoints -------------------------------------------------------------------------------


def copied(run: Path, tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "copy").mkdir(exist_ok=True)
    (tmp_path / "copy" / "checkpoint.pt").write_bytes(content)
    return tmp_path / "copy"


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(run: Path, tmp_path: Path, kept: float) -> None:
    whole = (run / "checkpoint.pt").read_bytes()
    short = copied(run, tmp_path, whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(
        InputError, match=r"expected a checkpoint of dragn-cache, got .*train again"
    ):
        load_checkpoint(short)


def test_a_changed_bit_is_refused_wherever_it_is(run: Path, tmp_path: Path) -> None:
    whole = (run / "checkpoint.pt").read_bytes()
    state = load_checkpoint(run)[0].state_dict()
    known = state["head.weight"].numpy().tobytes()
    assert known in whole
    places = [whole.index(known) + 5, *range(0, len(whole), 211)]
    refused = []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 16
        try:
            model, _ = load_checkpoint(copied(run, tmp_path, bytes(damaged)))
        except InputError:
            refused.append(place)
            continue
        # Padding and time stamps of the archive carry nothing.
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), place
    assert places[0] in refused


@pytest.mark.parametrize("record", [{"weights": 1}, [1, 2], "text"])
def test_a_file_of_another_program_is_refused(run: Path, tmp_path: Path, record: object) -> None:
    torch.save(record, tmp_path / "x.pt")
    other = copied(run, tmp_path, (tmp_path / "x.pt").read_bytes())
    with pytest.raises(InputError, match=r"copy/checkpoint\.pt: expected a checkpoint of dragn-"):
        load_checkpoint(other)


def test_a_checkpoint_of_another_version_is_refused(run: Path, tmp_path: Path) -> None:
    record = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**record, "version": 3}, tmp_path / "x.pt")
    other = copied(run, tmp_path, (tmp_path / "x.pt").read_bytes())
    with pytest.raises(InputError, match="expected checkpoint version 1 or 2, got 3; use"):
        load_checkpoint(other)


@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("config", [1], r"expected the settings of a training, got \[1\]"),
        ("config", {"epoch": 3}, "expected the settings of a training, got .*'epoch'"),
        ("config", {"lr": -1.0}, "expected the settings of a training, got lr: .*-1.0"),
        ("config", {"epochs": "9"}, "expected the settings of a training"),
        ("in_shape", [5, 0, 3], r"expected \(C, h, w\) or .*, got \[5, 0, 3\]"),
        ("in_shape", "523", "expected .*, got '523'"),
        ("tap", None, "expected the name of a tap, got None"),
        ("labels", "actin", "expected the names of the labels, each once, got 'actin'"),
        ("labels", ["a", "a", "b"], "expected the names of the labels, each once"),
        ("labels", ["a", 2, "b"], "expected the names of the labels, each once"),
        ("task", ["multilabel"], "expected multilabel or multiclass"),
        ("best_epoch", 1.5, "expected an epoch, or None, got 1.5"),
        ("decision", ["half"], "expected a rule of decision"),
        ("decision", {"threshold": 1}, "expected rule, thresholds, kept, got 'threshold'"),
        ("decision.rule", {"rule": 2}, "expected the name of a rule, got 2"),
        ("decision.rule", {"rule": "most"}, "expected default, half, .*, got 'most'"),
        ("decision.rule", {"rule": "top-4"}, "expected at most top-3 of 3 labels"),
        ("decision.thresholds", {"rule": "thresholds"}, "got None for the rule thresholds"),
        ("decision.thresholds", {"thresholds": (0.5, 0.5)}, r"each label, .*got \(0.5, 0.5\)"),
        ("decision.thresholds", {"thresholds": (0.1, 0.2, 0.3)}, "for the rule default"),
        ("decision.thresholds", {"rule": "thresholds", "thresholds": "abc"}, "got 'abc'"),
        ("decision.kept", {"kept": (3,)}, r"expected numbers of labels, got \(3,\)"),
        ("seen", {"000": 7}, "expected digests of bags by id, got {'000': 7}"),
        ("provenance", {"features": {}}, "expected settings of features and of numerics"),
        ("provenance", {"features": {}, "numerics": 4}, "expected settings of features and of"),
        ("provenance", {"features": {"size": {1: 2}}, "numerics": {}}, "expected settings of feat"),
        ("state", {"head.weight": [1.0]}, "expected tensors by name, got {'head.weight'"),
    ],
)
def test_a_field_of_another_kind_is_named(
    run: Path, tmp_path: Path, field: str, value: object, got: str
) -> None:
    record = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**record, field.partition(".")[0]: value}, tmp_path / "x.pt")
    other = copied(run, tmp_path, (tmp_path / "x.pt").read_bytes())
    with pytest.raises(InputError, match=rf"checkpoint\.pt, {field}: .*{got}.*; train again"):
        load_checkpoint(other)


@pytest.mark.parametrize(
    "field", ["config", "in_shape", "tap", "labels", "task", "provenance", "state"]
)
def test_a_field_that_is_missing_is_named(run: Path, tmp_path: Path, field: str) -> None:
    record = torch.load(run / "checkpoint.pt", weights_only=True)
    del record[field]
    torch.save(record, tmp_path / "x.pt")
    other = copied(run, tmp_path, (tmp_path / "x.pt").read_bytes())
    with pytest.raises(InputError, match=rf"checkpoint\.pt, {field}: expected .*, got none"):
        load_checkpoint(other)


def test_a_state_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    record = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**record, "state": {"head.weight": torch.zeros(3, 5)}}, tmp_path / "x.pt")
    other = copied(run, tmp_path, (tmp_path / "x.pt").read_bytes())
    with pytest.raises(InputError, match=r"expected a checkpoint of dragn-cache, got Error\(s\)"):
        load_checkpoint(other)


def names_a_class(run: Path, tmp_path: Path, name: str) -> Path:
    """A copy of a run whose checkpoint says that its aggregator is another."""
    record = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({**record, "config": {**record["config"], "aggregator": name}}, tmp_path / "x.pt")
    return copied(run, tmp_path, (tmp_path / "x.pt").read_bytes())


@pytest.mark.parametrize("command", ["predict", "evaluate", "explain"])
def test_no_class_is_imported_because_a_checkpoint_names_it(
    run: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "evilmod.py").write_text("open('imported', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    other = names_a_class(run, tmp_path, "evilmod:X")
    with pytest.raises(InputError, match=r"got evilmod:X; .* give `allow_class=evilmod:X`"):
        load_checkpoint(other)
    with pytest.raises(InputError, match="got evilmod:X"):  # another one is allowed
        load_checkpoint(other, "evilmod:Y")
    words = [command, other, "--store", store.path, "--out", "o"]
    assert "got evilmod:X" in command_line.refused(*words)
    assert "give --allow-class evilmod:X" in command_line.refused(*words)
    assert not (tmp_path / "imported").exists()
    monkeypatch.delitem(sys.modules, "evilmod", raising=False)
    with pytest.raises(InputError, match=r"expected package\.module:Class that can be imported"):
        load_checkpoint(other, "evilmod:X")
    assert (tmp_path / "imported").exists()


def test_an_allowed_class_is_not_taken_from_the_runs_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = names_a_class(run, tmp_path, "evilpack.inner:X")
    (other / "evilpack").mkdir()
    for name in ("__init__", "inner"):
        (other / "evilpack" / f"{name}.py").write_text("open('imported', 'w').close()\n")
    monkeypatch.chdir(other)
    monkeypatch.syspath_prepend(other)
    with pytest.raises(InputError, match=r"expected evilpack outside the run.s folder, got /"):
        load_checkpoint(other, "evilpack.inner:X")
    assert not (other / "imported").exists()


@pytest.mark.parametrize("name", ["", "abmil", "a:", ":X", "a..b:X", "a b:X", "../a:X", "a:X:Y"])
def test_what_is_no_classs_name_is_not_allowed(name: str) -> None:
    with pytest.raises(SettingError, match=r"allow_class: expected package\.module:Class"):
        ApplyConfig(allow_class=name)


@pytest.mark.parametrize("lacks", [(), ("seen", "decision", "best_epoch")])
def test_a_checkpoint_that_is_read_is_written_again(
    run: Path, tmp_path: Path, lacks: tuple[str, ...]
) -> None:
    record = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save({k: v for k, v in record.items() if k not in lacks}, tmp_path / "x.pt")
    first = read_checkpoint(copied(run, tmp_path, (tmp_path / "x.pt").read_bytes()))
    assert (first.seen is None) == ("seen" in lacks)
    write_checkpoint(tmp_path / "copy" / "checkpoint.pt", first)
    again = read_checkpoint(tmp_path / "copy")
    assert again.state.keys() == first.state.keys()
    assert all(torch.equal(v, first.state[k]) for k, v in again.state.items())
    assert replace(again, state={}) == replace(first, state={})


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a run folder with checkpoint\.pt, got none"):
        load_checkpoint(tmp_path)
    with pytest.raises(InputError, match="got no such folder; give a run folder of train-agg"):
        load_checkpoint(tmp_path / "nowhere")
