"""Evaluation: a run's own numbers come back, new bags are scored, bags trained on are refused."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_stores import LABELS, make_bags, make_features, with_splits, write_store
from sklearn.metrics import f1_score, precision_score, recall_score

from dragn_cache.errors import InputError, ManifestError, StoreMismatchError
from dragn_cache.manifest import Bag
from dragn_cache.runs.checkpoint import read_checkpoint
from dragn_cache.runs.config import EvaluateConfig
from dragn_cache.runs.evaluate import evaluate_run
from dragn_cache.runs.predict import predict_run
from dragn_cache.runs.train import train_run
from dragn_cache.scoring.decisions import Decision, decide
from dragn_cache.store import Store
from dragn_cache.training.config import TrainConfig

OWN = EvaluateConfig(split="test")
CONFIG = TrainConfig(
    aggregator="mean", epochs=3, batch_size=8, lr=3e-2, dropout=0.0, intervals=23, seed=5
)
FILES = ["SHA256SUMS", "calibration.png", "labels.csv", "metrics.json", "predictions.csv"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """53 bags with splits; those of the group ``twins`` are all in training."""
    bags = with_splits(make_bags(53))
    bags = [replace(b, group="twins" if k in (0, 2) else "") for k, b in enumerate(bags)]
    return write_store(tmp_path_factory.mktemp("s") / "own.features", bags, make_features(bags))


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("r") / "run"
    train_run(store, CONFIG.replace(decision="thresholds"), out)
    return out


def new_bags(count: int, seed: int = 7) -> tuple[list[Bag], Any]:
    bags = [replace(b, bag_id=f"new{b.bag_id}", group="") for b in make_bags(count, seed=seed)]
    return bags, make_features(bags, seed=seed)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("s") / "other.features", *new_bags(31))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def arrays(rows: list[dict[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y, p, d = (
        np.array([[float(row[f"{kind}_{label}"]) for label in LABELS] for row in rows])
        for kind in "ypd"
    )
    return y.astype(int), p, d.astype(int)


# --- the run's own bags --------------------------------------------------------------------------


def test_the_runs_numbers_come_back(run: Path, store: Store, tmp_path: Path) -> None:
    trained = metrics_of(run)
    for split in ("train", "validation", "test"):
        evaluate_run(run, tmp_path / split, EvaluateConfig(split=split))  # type: ignore[arg-type]
        assert metrics_of(tmp_path / split) == {split: trained[split]}
    found = evaluate_run(run, tmp_path / "default")
    assert (found.name, found.scores) == ("test", trained["test"])
    assert found.labels == LABELS
    evaluate_run(run, tmp_path / "stored", OWN, store=store)
    again = metrics_of(tmp_path / "stored")["test"]
    assert again.keys() == trained["test"].keys()
    for name in ("auc_macro", "f1_macro", "map", "accuracy", "f1", "thresholds", "positives"):
        assert again[name] == trained["test"][name], name
    assert again["intervals"]["f1_macro"] == trained["test"]["intervals"]["f1_macro"]
    assert again["brier"] == pytest.approx(trained["test"]["brier"])
    rows = [row for row in read(run / "predictions.csv") if row["split"] == "test"]
    for name in ("default", "stored"):
        got = read(tmp_path / name / "predictions.csv")
        assert [r["bag_id"] for r in got] == [r["bag_id"] for r in rows]
        np.testing.assert_allclose(arrays(got)[1], arrays(rows)[1], rtol=1e-6)


def test_all_the_runs_bags_at_once(run: Path, store: Store, tmp_path: Path) -> None:
    evaluate_run(run, tmp_path / "a", EvaluateConfig(split="all"))
    evaluate_run(run, tmp_path / "b", EvaluateConfig(split="all"), store=store)
    assert (tmp_path / "a" / "predictions.csv").read_bytes() == (
        run / "predictions.csv"
    ).read_bytes()
    assert [r["split"] for r in read(tmp_path / "b" / "predictions.csv")] == [
        bag.split for bag in store.bags
    ]
    assert metrics_of(tmp_path / "a")["all"]["bags"] == 53


def test_what_is_written(run: Path, tmp_path: Path) -> None:
    found = evaluate_run(run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    y, _, d = arrays(read(tmp_path / "out" / "predictions.csv"))
    table = read(tmp_path / "out" / "labels.csv")
    assert [row["label"] for row in table] == list(LABELS)
    assert [int(row["positives"]) for row in table] == y.sum(0).tolist()
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        got = [float(row[name]) for row in table]
        assert got == pytest.approx(list(score(y, d, average=None, zero_division=0)))
    assert [float(row["auc"]) for row in table] == pytest.approx(found.scores["auc"])
    assert [float(row["threshold"]) for row in table] == found.scores["thresholds"]
    with Image.open(tmp_path / "out" / "calibration.png") as image:
        assert image.size[1] > image.size[0] > 300


# --- decisions -----------------------------------------------------------------------------------


def test_thresholds_are_the_best_of_validation(run: Path) -> None:
    metrics = metrics_of(run)
    y, p, d = arrays([r for r in read(run / "predictions.csv") if r["split"] == "validation"])
    thresholds = metrics["validation"]["thresholds"]
    assert all(metrics[split]["thresholds"] == thresholds for split in metrics)
    assert (d == (p >= thresholds)).all()
    for label, threshold in enumerate(thresholds):
        said = [p[:, label] >= k / 100 for k in range(100)]
        f1 = [2 * (y[:, label] & d).sum() / (y[:, label].sum() + d.sum()) for d in said]
        assert f1[round(100 * threshold)] == max(f1)
    assert read_checkpoint(run).decision == Decision("thresholds", tuple(thresholds))


def test_test_targets_choose_nothing(store: Store, run: Path, tmp_path: Path) -> None:
    bags = [
        replace(bag, labels=tuple(set(LABELS) - set(bag.labels or ())))
        if bag.split == "test"
        else bag
        for bag in store.bags
    ]
    features = {bag.bag_id: store.bag(bag.bag_id, "layer4") for bag in bags}
    turned = write_store(tmp_path / "s", bags, features)
    train_run(turned, CONFIG.replace(decision="thresholds"), tmp_path / "run")
    before, after = (metrics_of(folder) for folder in (run, tmp_path / "run"))
    assert after["test"]["f1_macro"] != before["test"]["f1_macro"]
    assert after["validation"] == before["validation"]
    assert after["test"]["thresholds"] == before["test"]["thresholds"]
    checkpoints = [(folder / "checkpoint.pt").read_bytes() for folder in (run, tmp_path / "run")]
    assert checkpoints[0] == checkpoints[1]


def test_a_label_without_validation_bags_is_told(store: Store, tmp_path: Path) -> None:
    bags = [
        replace(bag, labels=tuple(label for label in bag.labels or () if label != "golgi"))
        if bag.split == "validation"
        else bag
        for bag in store.bags
    ]
    features = {bag.bag_id: store.bag(bag.bag_id, "layer4") for bag in bags}
    lacking = write_store(tmp_path / "s", bags, features)
    told: list[str] = []
    config = CONFIG.replace(decision="thresholds", intervals=0)
    metrics = train_run(lacking, config, tmp_path / "run", warn=told.append)
    assert told == ["no validation bag has these labels, their thresholds stay 0.5: golgi"]
    assert metrics["test"]["thresholds"][1] == 0.5
    assert metrics["test"]["thresholds_kept"] == [1]


def test_predictions_use_the_runs_thresholds(run: Path, other: Store, tmp_path: Path) -> None:
    scores = predict_run(run, other, tmp_path / "p")
    evaluate_run(run, tmp_path / "e", store=other)
    assert scores is not None
    assert scores["thresholds"] == metrics_of(run)["test"]["thresholds"]
    assert metrics_of(tmp_path / "e")["new"] == scores
    first, second = ((tmp_path / name / "predictions.csv").read_bytes() for name in "pe")
    assert first == second
    _, p, d = arrays(read(tmp_path / "p" / "predictions.csv"))
    assert (d == (p >= scores["thresholds"])).all()
    assert (d != decide(p, "multilabel")).any()


def test_another_rule_may_be_asked_for(store: Store, run: Path, tmp_path: Path) -> None:
    train_run(store, CONFIG, tmp_path / "plain")
    for name, rule in (("half", "half"), ("one", "top-1"), ("best", "thresholds")):
        evaluate_run(tmp_path / "plain", tmp_path / name, EvaluateConfig(decision=rule))
        y, p, d = arrays(read(tmp_path / name / "predictions.csv"))
        scores = metrics_of(tmp_path / name)["test"]
        assert scores["decision"] == rule
        assert scores["f1_micro"] == pytest.approx(f1_score(y, d, average="micro"))
        if rule == "half":
            assert (d == (p >= 0.5)).all()
            assert {row["threshold"] for row in read(tmp_path / name / "labels.csv")} == {"0.5"}
        if rule == "top-1":
            assert (d.sum(1) == 1).all()
            assert {row["threshold"] for row in read(tmp_path / name / "labels.csv")} == {""}
    # Chosen after the training they are the same as those of a run that was trained with them.
    assert metrics_of(tmp_path / "best")["test"] == metrics_of(run)["test"]
    with pytest.raises(InputError, match="decision: expected at most top-3 of 3 labels"):
        evaluate_run(run, tmp_path / "x", EvaluateConfig(decision="top-4"))
    with pytest.raises(InputError, match="decision: expected default, half"):
        evaluate_run(run, tmp_path / "x", EvaluateConfig(decision="best"))
    with pytest.raises(InputError, match="at most top-3"):
        train_run(store, CONFIG.replace(decision="top-4"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_classes(tmp_path: Path) -> None:
    bags = with_splits(make_bags(41, task="multiclass"))
    classes = write_store(tmp_path / "s", bags, make_features(bags), task="multiclass")
    train_run(classes, CONFIG, tmp_path / "run")
    found = evaluate_run(tmp_path / "run", tmp_path / "a")
    assert found.scores == metrics_of(tmp_path / "run")["test"]
    y, p, d = arrays(read(tmp_path / "a" / "predictions.csv"))
    assert (d.argmax(1) == p.argmax(1)).all()
    assert found.scores["accuracy"] == pytest.approx((y.argmax(1) == p.argmax(1)).mean())
    with pytest.raises(InputError, match="expected default for a multi-class task"):
        evaluate_run(tmp_path / "run", tmp_path / "b", EvaluateConfig(decision="thresholds"))
    two = [replace(bag, bag_id=f"n{bag.bag_id}", labels=LABELS[:2]) for bag in bags[:5]]
    both = write_store(tmp_path / "t", two, make_features(two, seed=3))
    with pytest.raises(ManifestError, match=r"expected exactly one label .*got 2 for bag 'n000'"):
        evaluate_run(tmp_path / "run", tmp_path / "b", store=both)


def test_a_method_without_epochs(store: Store, other: Store, tmp_path: Path) -> None:
    config = TrainConfig(aggregator="svm", decision="thresholds", intervals=0)
    metrics = train_run(store, config, tmp_path / "run")
    assert metrics["test"]["decision"] == "thresholds"
    assert evaluate_run(tmp_path / "run", tmp_path / "a").scores == metrics["test"]
    assert evaluate_run(tmp_path / "run", tmp_path / "b", store=other).scores["bags"] == 31
    with pytest.raises(InputError, match="got 32 of 53 that it was"):
        evaluate_run(tmp_path / "run", tmp_path / "c", store=store)


# --- bags that were trained on -------------------------------------------------------------------


def test_trained_bags_are_no_new_bags(run: Path, store: Store, tmp_path: Path) -> None:
    message = (
        r"own\.features: expected bags that run was not trained on, got 32 of 53 that it was: "
        r"'000', of its train bags; name the others .*score its test bags with `split=test`"
    )
    with pytest.raises(InputError, match=message):
        evaluate_run(run, tmp_path / "out", store=store)
    assert not (tmp_path / "out").exists()
    only_test = [bag.bag_id for bag in store.bags if bag.split == "test"]
    table = tmp_path / "b.csv"
    table.write_text("bag_id\n" + "\n".join(only_test) + "\n")
    scores = evaluate_run(run, tmp_path / "out", store=store, bags_csv=table).scores
    assert scores["auc"] == metrics_of(run)["test"]["auc"]
    table.write_text("bag_id\n004\n")
    with pytest.raises(InputError, match="got 1 of 1 that it was: '004', of its validation bags"):
        evaluate_run(run, tmp_path / "x", store=store, bags_csv=table)


def test_a_trained_bag_is_known_by_its_group_and_its_features(
    run: Path, store: Store, tmp_path: Path
) -> None:
    bags, features = new_bags(7)
    bags[3] = replace(bags[3], group="twins")
    twins = write_store(tmp_path / "t", bags, features)
    message = "1 of 7 that it was: 'new003', of the same group 'twins' as its bag '002'"
    with pytest.raises(InputError, match=message):
        evaluate_run(run, tmp_path / "out", store=twins)
    table = tmp_path / "b.csv"
    table.write_text("bag_id,group\n" + "".join(f"{bag.bag_id},\n" for bag in bags))
    with pytest.raises(InputError, match=message):  # the table hides the group
        evaluate_run(run, tmp_path / "out", store=twins, bags_csv=table)
    bags, features = new_bags(7)
    features["new005"] = store.bag("004", "layer4")
    features["new006"] = store.bag("001", "layer4")  # a test bag
    copied = write_store(tmp_path / "c", bags, features)
    with pytest.raises(InputError, match=r"1 of 7 .*'new005', with the features of its bag '004'"):
        evaluate_run(run, tmp_path / "out", store=copied)


def test_only_the_runs_own_store_has_its_splits(
    run: Path, store: Store, other: Store, tmp_path: Path
) -> None:
    message = r"other\.features: expected for `split=test` the bags .*, got none named '000'; give"
    with pytest.raises(StoreMismatchError, match=message):
        evaluate_run(run, tmp_path / "out", OWN, store=other)
    features = {bag.bag_id: store.bag(bag.bag_id, "layer4").copy() for bag in store.bags}
    features["004"] += 1
    changed = write_store(tmp_path / "s", store.bags, features)
    with pytest.raises(StoreMismatchError, match="got other features for '004'"):
        evaluate_run(run, tmp_path / "out", OWN, store=changed)
    features["004"] = store.bag("004", "layer4")
    features["001"] = features["004"]  # a test bag becomes a training bag
    changed = write_store(tmp_path / "t", store.bags, features)
    with pytest.raises(StoreMismatchError, match="got other features for '001'"):
        evaluate_run(run, tmp_path / "out", OWN, store=changed)
    fewer = [bag for bag in store.bags if bag.bag_id != "001"]
    lost = write_store(tmp_path / "l", fewer, {b.bag_id: features[b.bag_id] for b in fewer})
    with pytest.raises(StoreMismatchError, match="got none named '001'"):
        evaluate_run(run, tmp_path / "out", OWN, store=lost)
    table = tmp_path / "b.csv"
    table.write_text("bag_id\n000\n")
    with pytest.raises(InputError, match=r"b\.csv: expected bags of the test split of run, got no"):
        evaluate_run(run, tmp_path / "out", OWN, store=store, bags_csv=table)


def test_other_features_labels_and_bags_without_labels_are_refused(
    run: Path, tmp_path: Path
) -> None:
    bags, features = new_bags(5)
    settings = {"features": {"size": [59, 61]}}
    sized = write_store(tmp_path / "a", bags, features, provenance=settings)
    with pytest.raises(StoreMismatchError, match=r"features\.size is \[41, 53\], asked for \[59"):
        evaluate_run(run, tmp_path / "out", store=sized)
    plain = write_store(tmp_path / "b", bags, features)
    table = tmp_path / "b.csv"
    table.write_text("bag_id,labels\nnew001,golgi;strange\n")
    with pytest.raises(ManifestError, match=r"b\.csv:2: expected a known label, got 'strange'"):
        evaluate_run(run, tmp_path / "out", store=plain, bags_csv=table)
    nameless = [replace(bag, labels=None) for bag in bags]
    unlabelled = write_store(tmp_path / "c", nameless, features)
    with pytest.raises(InputError, match="expected a labels column, got none for bag 'new000'"):
        evaluate_run(run, tmp_path / "out", store=unlabelled)
    with pytest.raises(
        InputError, match="bags_csv: expected a `store` whose bags they are, got none"
    ):
        evaluate_run(run, tmp_path / "out", bags_csv=table)
    assert not (tmp_path / "out").exists()


# --- runs of before, and damaged ones ------------------------------------------------------------


def copy_of(run: Path, folder: Path) -> Path:
    """A run to change: without digests, as those of older versions."""
    folder.mkdir()
    for path in run.iterdir():
        if path.name != "SHA256SUMS":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_runs_of_before_decisions_still_work(
    run: Path, store: Store, other: Store, tmp_path: Path
) -> None:
    old = copy_of(run, tmp_path / "old")
    record = torch.load(run / "checkpoint.pt", weights_only=True)
    del record["decision"], record["seen"], record["config"]["decision"]
    torch.save(record, old / "checkpoint.pt")
    table = [line.split(",")[:8] for line in (run / "predictions.csv").read_text().splitlines()]
    (old / "predictions.csv").write_text("\n".join(",".join(cells) for cells in table) + "\n")
    told: list[str] = []
    assert evaluate_run(old, tmp_path / "a", warn=told.append).scores["decision"] == "default"
    assert told == []
    evaluate_run(old, tmp_path / "b", store=other, warn=told.append)
    assert told == ["old is of before digests of bags were kept: they are known by id and group"]
    assert predict_run(old, other, tmp_path / "c") == metrics_of(tmp_path / "b")["new"]
    with pytest.raises(InputError, match="'000', of its train bags"):
        evaluate_run(old, tmp_path / "d", store=store)
    scores = evaluate_run(
        old, tmp_path / "d", OWN.replace(decision="thresholds"), store=store
    ).scores
    assert scores["thresholds"] == metrics_of(run)["test"]["thresholds"]


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("predictions.csv", None, r"predictions\.csv: expected .* bag_id, got no such file"),
        ("predictions.csv", "bag_id,split\n1,test\n", "expected the run's table with y_actin, got"),
        ("splits.csv", "bag_id,split\n1,test\n", r"splits\.csv: .* table with group, got none"),
        ("splits.csv", None, r"splits\.csv: expected .* got no such file; give a run folder of tr"),
    ],
)
def test_a_run_that_lacks_something_is_refused(
    run: Path, other: Store, tmp_path: Path, name: str, text: str | None, match: str
) -> None:
    broken = copy_of(run, tmp_path / "broken")
    (broken / name).unlink()
    if text is not None:
        (broken / name).write_text(text)
    with pytest.raises(InputError, match=match):
        evaluate_run(broken, tmp_path / "o", store=other if name == "splits.csv" else None)


def test_a_damaged_number_is_refused(run: Path, tmp_path: Path) -> None:
    broken = copy_of(run, tmp_path / "broken")
    lines = (run / "predictions.csv").read_text().splitlines()
    cells = lines[2].split(",")
    for wrong in ("", "nan", "1.5"):
        lines[2] = ",".join([*cells[:5], wrong, *cells[6:]])
        (broken / "predictions.csv").write_text("\n".join(lines))
        with pytest.raises(InputError, match=rf"csv:3: .* 0 to 1 in p_actin, got '{wrong}'; rest"):
            evaluate_run(broken, tmp_path / "o")


@pytest.mark.parametrize("table", ["predictions.csv", "splits.csv"])
def test_a_bag_twice_in_a_runs_table_is_refused(
    run: Path, store: Store, tmp_path: Path, table: str
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    lines = (copy / table).read_text().splitlines(keepends=True)
    (copy / table).write_text("".join([*lines, lines[4]]))
    (copy / "SHA256SUMS").unlink()  # as in runs of before there were any
    message = rf"{table}:55: expected one row for each bag, got '003' again \(first at line 5\)"
    with pytest.raises(InputError, match=message):
        evaluate_run(copy, tmp_path / "out", OWN, store=store if table == "splits.csv" else None)
    assert not (tmp_path / "out").exists()


def test_new_bags_that_share_images_or_look_like_trained_ones_are_told(tmp_path: Path) -> None:
    bags = with_splits(make_bags(31))
    added = [replace(b, bag_id=f"new{b.bag_id}", split="") for b in make_bags(5, seed=3)]
    added[1] = replace(added[1], bag_id="2")
    features = make_features(bags) | make_features(added, seed=3)
    digests = {"new000": b"x" * 32, "new004": b"y" * 32, "000": b"x" * 32, "001": b"y" * 32}
    old = write_store(tmp_path / "old", bags, features, digests=digests)
    train_run(old, CONFIG, tmp_path / "run")
    all_bags = write_store(tmp_path / "all", [*bags, *added], features, digests=digests)
    table = tmp_path / "new.csv"
    table.write_text("bag_id\n" + "".join(f"{b.bag_id}\n" for b in added))
    told: list[str] = []
    evaluate_run(tmp_path / "run", tmp_path / "e", store=all_bags, bags_csv=table, warn=told.append)
    assert told == [
        "the run has seen a bag '002', and '2' is scored as new: they differ by leading zeros",
        "bags with the same images on two sides of the split: '000' and 'new000'; give them one "
        "group",
    ]


def test_a_folder_with_files_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match="run: expected a new folder, got one with files"):
        evaluate_run(run, run)
