"""Cross-validation: each bag tested once, groups whole, one result in any order, sums by hand."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from run_stores import make_bags, make_features, with_splits, write_store
from scipy import stats

from dragn_cache import devices
from dragn_cache.aggregators import Aggregated
from dragn_cache.aggregators.mean import Mean
from dragn_cache.errors import InputError, StoreMismatchError, UnknownNameError
from dragn_cache.figures.crossval import plot_crossval
from dragn_cache.manifest import write_bags
from dragn_cache.ragged import RaggedBags
from dragn_cache.scoring.comparison import corrected_t_test
from dragn_cache.scoring.decisions import GRID, decide
from dragn_cache.scoring.scores import SCORES
from dragn_cache.store import Store, json_digest
from dragn_cache.studies.config import CrossvalConfig
from dragn_cache.studies.crossval import CrossvalResult, crossval
from dragn_cache.studies.folder import DIGEST
from dragn_cache.studies.trainings import training_seed
from dragn_cache.training.config import TrainConfig

TRAIN = TrainConfig(epochs=2, batch_size=8, lr=3e-2, dropout=0.1, intervals=60)
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (("mean", {}), ("abmil", {"attn_dim": 5}))
CONFIG = CrossvalConfig(train=TRAIN, aggregators=METHODS, folds=3, seeds=2, jobs=1)
LABELS = ["mean", "abmil-attn_dim=5"]
TABLES = ["comparison.csv", "folds.csv", "predictions.csv", "splits.csv", "summary.csv"]
CPU_SECONDS = ("seconds", "seconds_mean")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """29 bags, most of them in groups, with maps and vectors."""
    bags = make_bags(29)
    return write_store(tmp_path_factory.mktemp("s") / "made.features", bags, make_features(bags))


@pytest.fixture(scope="module")
def out(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-validation of two methods."""
    path = tmp_path_factory.mktemp("cv") / "cv"
    crossval(store, CONFIG, path)
    return path


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all trainings; two tests look at pictures."""
    monkeypatch.setattr("dragn_cache.figures.crossval.plot_crossval", lambda *args: None)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    """Every table, without what a clock has measured."""
    return {
        name: [
            {k: v for k, v in row.items() if k not in CPU_SECONDS} for row in rows_of(out / name)
        ]
        for name in TABLES
    }


def numbers(rows: Iterable[dict[str, str]], column: str) -> np.ndarray:
    return np.array([float(row[column]) for row in rows if row[column] != ""])


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("L")))) > 5


class Spread(Mean):
    """The mean over the variance, which a bag of one instance does not have."""

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        parts = self.vectors(bags).split(bags.offsets.diff().tolist())
        spread = [(x - x.mean(0)).square().sum(0) / (len(x) - 1) for x in parts]
        rows = super().aggregate(bags).embedding
        return Aggregated(rows if self.training else rows / torch.stack(spread), None)


class Stumbling(Mean):
    """The mean, but the trainings whose numbers are in ``stumbles`` end in an error."""

    started: ClassVar[int] = 0
    stumbles: ClassVar[tuple[int, ...]] = ()

    def fit(self, batches: Iterable[RaggedBags]) -> None:
        Stumbling.started += 1
        if Stumbling.started in Stumbling.stumbles:
            raise RuntimeError("stumbled\nhere")


def test_the_folder_holds_what_it_should(out: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*TABLES, "SHA256SUMS", "config.toml", "crossval.png", "trainings"]
    )
    assert is_picture(out / "crossval.png")


# --- the protocol ------------------------------------------------------------------------------


def test_every_bag_is_tested_once_a_seed_and_method(store: Store, out: Path) -> None:
    tested = [(r["aggregator"], r["seed"], r["bag_id"]) for r in rows_of(out / "predictions.csv")]
    assert len(tested) == len(set(tested)) == len(LABELS) * 2 * len(store.bags)


def test_groups_are_whole_and_every_method_sees_the_same_folds(store: Store, out: Path) -> None:
    splits = {row["bag_id"]: row for row in rows_of(out / "splits.csv")}
    assert list(splits) == store.bag_ids
    folds_of_group = defaultdict(set)
    for bag in store.bags:
        for seed in (0, 1):
            if bag.group:
                folds_of_group[bag.group, seed].add(splits[bag.bag_id][f"fold_seed{seed}"])
    assert len(folds_of_group) > 10
    assert all(len(folds) == 1 for folds in folds_of_group.values())
    assert any(row["fold_seed0"] != row["fold_seed1"] for row in splits.values())
    for row in rows_of(out / "predictions.csv"):
        assert splits[row["bag_id"]][f"fold_seed{row['seed']}"] == row["fold"]


def test_the_next_fold_is_for_validation(out: Path) -> None:
    splits = rows_of(out / "splits.csv")
    for row in rows_of(out / "folds.csv"):
        sizes = [0, 0, 0]
        for bag in splits:
            sizes[int(bag[f"fold_seed{row['seed']}"])] += 1
        test = int(row["fold"])
        wanted = [sizes[test], sizes[(test + 1) % 3], sizes[(test + 2) % 3]]
        found = [int(row[f"{name}_bags"]) for name in ("test", "validation", "train")]
        assert found == wanted


def test_trainings_have_seeds_of_their_own() -> None:
    seeds = {training_seed(seed, fold) for seed in range(13) for fold in range(11)}
    assert len(seeds) == 13 * 11
    assert max(seeds) < 2**32


# --- one result --------------------------------------------------------------------------------


def test_two_processes_give_what_one_gives(store: Store, out: Path, tmp_path: Path) -> None:
    crossval(store, CONFIG.replace(jobs=2), tmp_path / "two")
    assert tables(tmp_path / "two") == tables(out)


def test_processes_find_a_class_on_pythons_path(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped_mean.py").write_text("from dragn_cache.aggregators.mean import Mean\n")
    monkeypatch.syspath_prepend(tmp_path)
    methods: tuple[tuple[str, dict[str, Any]], ...] = (("shipped_mean:Mean", {}), ("mean", {}))
    config = CONFIG.replace(aggregators=methods, seeds=1, jobs=2)
    result = crossval(store, config, tmp_path / "cv")
    assert result.failed == ()
    first, second = ({**row, "aggregator": ""} for row in result.summary)
    assert first["auc_macro_mean"] == second["auc_macro_mean"]


def test_an_interrupted_cross_validation_goes_on(store: Store, out: Path, tmp_path: Path) -> None:
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crossval(store, CONFIG, tmp_path / "cv", progress=interrupt)
    assert seen == [(k, 12) for k in range(6)]
    finished = {p: p.read_bytes() for p in (tmp_path / "cv").rglob("*.json")}
    assert len(finished) == 5
    again: list[int] = []
    crossval(store, CONFIG, tmp_path / "cv", progress=lambda done, total: again.append(done))
    assert again == list(range(5, 13))
    assert {p: p.read_bytes() for p in finished} == finished
    assert tables(tmp_path / "cv") == tables(out)


def test_a_finished_one_only_writes_its_tables(store: Store, out: Path) -> None:
    before = {name: (out / name).read_bytes() for name in TABLES}
    again: list[int] = []
    crossval(store, CONFIG, out, progress=lambda done, total: again.append(done))
    assert again == [12]
    assert {name: (out / name).read_bytes() for name in TABLES} == before


def test_methods_and_seeds_may_be_added(store: Store, tmp_path: Path) -> None:
    small = CONFIG.replace(aggregators=METHODS[:1], seeds=1)
    crossval(store, small, tmp_path / "cv")
    first = tables(tmp_path / "cv")["folds.csv"]
    counts: list[int] = []
    more = small.replace(aggregators=(("max", {}), *METHODS[:1]), seeds=2)
    crossval(store, more, tmp_path / "cv", progress=lambda done, total: counts.append(done))
    assert (counts[0], counts[-1]) == (3, 12)
    second = tables(tmp_path / "cv")["folds.csv"]
    assert [r for r in second if r["aggregator"] == "mean" and r["seed"] == "0"] == first
    with pytest.raises(StoreMismatchError, match=r"methods\.max\.lr is 0\.03, asked for 0\.5"):
        crossval(store, more.replace(train=TRAIN.replace(lr=0.5)), tmp_path / "cv")
    crossval(store, small, tmp_path / "cv")
    assert tables(tmp_path / "cv")["folds.csv"] == first


# --- what may not be mixed ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"folds": 4}, r"crossval\.folds is 3, asked for 4"),
        ({"train": TRAIN.replace(epochs=3)}, r"methods\.mean\.epochs is 2, asked for 3"),
        ({"train": TRAIN.replace(memory="1kB")}, r'memory is absent, asked for "1000B"'),
        ({"train": TRAIN.replace(tap="layer4")}, r'methods\.mean\.tap is "gap"'),
    ],
)
def test_other_settings_are_refused(
    store: Store, out: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(StoreMismatchError, match=named):
        crossval(store, CONFIG.replace(**change), out)


def test_other_bags_and_features_are_refused(store: Store, out: Path, tmp_path: Path) -> None:
    bags = [replace(bag, group="") for bag in store.bags]
    write_bags(bags, tmp_path / "bags.csv")
    with pytest.raises(StoreMismatchError, match=r"data\.bags is "):
        crossval(store, CONFIG, out, bags_csv=tmp_path / "bags.csv")
    other = write_store(
        tmp_path / "other.features",
        store.bags,
        make_features(store.bags),
        provenance={"features": {"backbone": "another"}},
    )
    with pytest.raises(StoreMismatchError, match=r"data\.features is "):
        crossval(other, CONFIG, out)
    features = make_features(store.bags)
    features["004"] += 1
    corrected = write_store(tmp_path / "corrected.features", store.bags, features)
    with pytest.raises(StoreMismatchError, match=r"data\.content is "):
        crossval(corrected, CONFIG, out)


def test_a_folder_left_by_an_early_kill_is_taken_up(store: Store, tmp_path: Path) -> None:
    (tmp_path / "cv").mkdir()
    (tmp_path / "cv" / ".config.toml.123.tmp").write_text("[crossv")
    config = CONFIG.replace(aggregators=METHODS[:1], seeds=1)
    assert not crossval(store, config, tmp_path / "cv").failed


def test_one_process_at_a_time_cross_validates_in_a_folder(store: Store, tmp_path: Path) -> None:
    config = CONFIG.replace(aggregators=METHODS[:1], seeds=1)

    def another(done: int, total: int) -> None:
        with pytest.raises(InputError, match=r"nobody else cross-validates in, got process \d+ on"):
            crossval(store, config, tmp_path / "cv")

    crossval(store, config, tmp_path / "cv", progress=another)
    left = tmp_path / "cv" / "trainings" / "mean" / ".seed0-fold0.json.123.tmp"
    left.touch()  # of a process that was killed while it wrote
    crossval(store, config, tmp_path / "cv")
    assert not list((tmp_path / "cv").rglob(".*"))


def test_what_is_refused_begins_no_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one group of bags for each of 99 folds"):
        crossval(store, CONFIG.replace(folds=99), tmp_path / "cv")
    assert not (tmp_path / "cv").exists()


def test_bags_with_the_same_features_are_told_unless_of_one_group(tmp_path: Path) -> None:
    bags = make_bags(29)
    features = make_features(bags)
    features["007"], features["013"] = features["005"], features["011"]
    bags = [replace(b, group="same" if b.bag_id in ("011", "013") else "") for b in bags]
    store = write_store(tmp_path / "s", bags, features)
    said: list[str] = []
    config = CONFIG.replace(aggregators=METHODS[:1], seeds=1)
    crossval(store, config, tmp_path / "cv", warn=said.append)
    assert said == [
        "bags with the same features perhaps on two sides of a fold: '005' and '007'; "
        "give them one group"
    ]


def test_bags_with_the_same_images_and_names_that_mislead_are_told(tmp_path: Path) -> None:
    bags = [replace(b, group="") for b in make_bags(29)]
    bags[3] = replace(bags[3], group="plate1")
    bags[4] = replace(bags[4], group="Plate1")
    digests = dict.fromkeys(("005", "007"), b"x" * 32)
    store = write_store(tmp_path / "s", bags, make_features(bags), digests=digests)
    said: list[str] = []
    config = CONFIG.replace(aggregators=METHODS[:1], seeds=1)
    crossval(store, config, tmp_path / "cv", warn=said.append)
    names, images = said
    assert "look-alike-group" in names
    assert "'Plate1' here and 'plate1' at line 5, which differ by case" in names
    assert images.startswith("bags with the same images perhaps on two sides of a fold: '005' and")


def test_folds_of_one_class_have_no_rank_scores_and_are_told(tmp_path: Path) -> None:
    """All bags but those of one group have the label, so two of three folds have one class."""
    bags = [replace(b, labels=("golgi",), group="") for b in make_bags(24)]
    bags[:4] = [replace(b, labels=(), group="without") for b in bags[:4]]
    store = write_store(tmp_path / "s", bags, make_features(bags))
    said: list[str] = []
    config = CONFIG.replace(aggregators=METHODS[:1], seeds=1)
    crossval(store, config, tmp_path / "cv", warn=said.append)
    assert said[-2:] == [
        "in 2 of 3 test folds the bags have one class only of every label: AUC and mAP are "
        "undefined there, accuracy and F1 tell nothing",
        "in every test fold the bags have one class only of actin, nucleus: AUC and mAP leave such "
        "labels out",
    ]
    folds = rows_of(tmp_path / "cv" / "folds.csv")
    assert sorted(bool(row["map"]) for row in folds) == [False, False, True]


def test_a_folder_of_something_else_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="a new folder"):
        crossval(store, CONFIG, tmp_path)
    (tmp_path / "config.toml").write_text("[train]\nlr = 1\n")
    with pytest.raises(InputError, match="a cross-validation's"):
        crossval(store, CONFIG, tmp_path)


def test_a_damaged_training_is_named(store: Store, out: Path, tmp_path: Path) -> None:
    crossval(store, CONFIG.replace(seeds=1), tmp_path / "cv")
    path = tmp_path / "cv" / "trainings" / "mean" / "seed0-fold1.json"
    text = path.read_text()
    path.write_text(text[:37])
    with pytest.raises(InputError, match=r"seed0-fold1\.json.*move the file away"):
        crossval(store, CONFIG, tmp_path / "cv")
    sound = json.loads(text)
    del sound[DIGEST]
    for fields, got in (
        ({"probabilities": sound["probabilities"][1:]}, "other test probabilities than"),
        ({"validation": [[2.0] * 3] * len(sound["validation"])}, "other validation probabilities"),
        ({"fold": 0}, r"that of \('mean', 0, 0\)"),
        ({"seconds": {}}, "validation error"),
    ):
        record = {**sound, **fields}
        path.write_text(json.dumps({**record, DIGEST: json_digest(record)}))
        with pytest.raises(InputError, match=rf"seed0-fold1\.json.*{got}"):
            crossval(store, CONFIG, tmp_path / "cv")


# --- the sums ----------------------------------------------------------------------------------


def test_scores_of_a_fold_follow_from_the_predictions(out: Path) -> None:
    for row in rows_of(out / "folds.csv"):
        own = [
            r
            for r in rows_of(out / "predictions.csv")
            if all(r[k] == row[k] for k in ("aggregator", "seed", "fold"))
        ]
        y = np.array([[float(v) for k, v in r.items() if k.startswith("y_")] for r in own])
        p = np.array([[float(v) for k, v in r.items() if k.startswith("p_")] for r in own])
        right = (decide(p, "multilabel") == y).all(axis=1)
        assert float(row["accuracy"]) == pytest.approx(right.mean(), abs=1e-12)
        assert int(row["labels_undefined"]) == sum(len(set(column)) == 1 for column in y.T)


def test_thresholds_come_from_validation_and_need_no_new_training(
    store: Store, tmp_path: Path
) -> None:
    config = CONFIG.replace(aggregators=METHODS[:1])
    crossval(store, config, tmp_path / "cv")
    counts: list[int] = []
    other = config.replace(train=TRAIN.replace(decision="thresholds"))
    crossval(store, other, tmp_path / "cv", progress=lambda done, total: counts.append(done))
    assert counts == [6]
    predictions = rows_of(tmp_path / "cv" / "predictions.csv")
    targets = {row["bag_id"]: row["y_actin"] == "1" for row in predictions}
    for path in sorted((tmp_path / "cv" / "trainings" / "mean").iterdir()):
        seed, fold = (int(part) for part in re.findall(r"\d+", path.name))
        p = np.array(json.loads(path.read_text())["validation"])[:, 0]
        validation = [
            row["bag_id"]
            for row in rows_of(tmp_path / "cv" / "splits.csv")
            if int(row[f"fold_seed{seed}"]) == (fold + 1) % 3
        ]
        y = np.array([targets[bag] for bag in validation])
        f1 = [2 * (y & (p >= t)).sum() / (y.sum() + (p >= t).sum()) for t in GRID]
        best = min(np.flatnonzero(f1 == np.max(f1)), key=lambda k: (abs(k - 50), k))
        own = [r for r in predictions if (r["seed"], r["fold"]) == (str(seed), str(fold))]
        assert [r["d_actin"] == "1" for r in own] == [
            float(r["p_actin"]) >= GRID[best] for r in own
        ]


def test_the_summary_is_the_mean_over_folds_and_seeds(out: Path) -> None:
    folds, summary = rows_of(out / "folds.csv"), rows_of(out / "summary.csv")
    assert [row["aggregator"] for row in summary] == LABELS
    assert list(summary[0])[:5] == [
        "aggregator",
        "accuracy_mean",
        "accuracy_sd",
        "auc_macro_mean",
        "auc_macro_sd",
    ]
    for row in summary:
        own = [r for r in folds if r["aggregator"] == row["aggregator"]]
        assert (row["trainings"], row["failed"]) == ("6", "0")
        for score in (s.name for s in SCORES):
            values = numbers(own, score)
            assert float(row[f"{score}_mean"]) == pytest.approx(values.mean(), abs=1e-12)
            assert float(row[f"{score}_sd"]) == pytest.approx(values.std(ddof=1), abs=1e-12)
            assert float(row[f"{score}_low"]) <= float(row[f"{score}_high"])
        assert float(row["seconds_mean"]) == pytest.approx(numbers(own, "seconds").mean())
    # A linear head on 5 channels and 3 labels; ABMIL's 5 × 5 + 5 and its vector of 5 beside it.
    assert [row["parameters"] for row in summary] == ["18", str(18 + 5 * 5 + 5 + 5)]


def test_comparisons_are_the_corrected_t_test_over_folds(out: Path) -> None:
    folds, found = rows_of(out / "folds.csv"), rows_of(out / "comparison.csv")
    assert [row["score"] for row in found] == ["accuracy", "auc_macro", "f1_macro", "map"]
    first, second = ([r for r in folds if r["aggregator"] == label] for label in LABELS)
    ratio = np.mean([int(r["test_bags"]) / int(r["train_bags"]) for r in first])
    for row in found:
        d = numbers(first, row["score"]) - numbers(second, row["score"])
        error = np.sqrt((1 / 6 + ratio) * d.var(ddof=1))
        assert (row["first"], row["second"], row["tests"]) == (*LABELS, "6")
        low, high = stats.t.interval(0.95, 5, d.mean(), error)
        p = 2 * stats.t.sf(abs(d.mean() / error), 5)
        columns = ("difference_mean", "difference_sd", "difference_low", "difference_high", "p")
        values = [float(row[column]) for column in columns]
        assert values == pytest.approx([d.mean(), d.std(ddof=1), low, high, p], abs=1e-10)


def test_a_comparison_of_equal_or_single_differences_has_no_p() -> None:
    assert corrected_t_test(np.array([0.25]), 0.5) == (None, None, None)
    assert corrected_t_test(np.array([0.25, 0.25]), 0.5) == (0.25, 0.25, None)
    rounded = np.array([0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.6])
    assert corrected_t_test(rounded, 0.5)[2] is None


def test_a_label_with_one_class_is_left_out_and_counted(tmp_path: Path) -> None:
    bags = [replace(b, labels=("actin",) if k < 13 else ()) for k, b in enumerate(make_bags(26))]
    bags[2] = replace(bags[2], labels=("actin", "golgi"))
    store = write_store(tmp_path / "s", bags, make_features(bags))
    train = TRAIN.replace(decision="thresholds")
    config = CONFIG.replace(train=train, aggregators=METHODS[:1], seeds=1)
    crossval(store, config, tmp_path / "cv")
    folds = rows_of(tmp_path / "cv" / "folds.csv")
    undefined = [row["labels_undefined"] for row in folds]
    assert sorted(undefined) == ["1", "2", "2"]  # golgi is in one fold, nucleus in none
    kept = [row["notes"].rsplit(": ")[-1] for row in folds]
    assert sorted(kept) == ["golgi, nucleus", "golgi, nucleus", "nucleus"]


# --- trainings that fail -----------------------------------------------------------------------


def test_a_training_that_fails_is_recorded_and_tried_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stumbling, "started", 0)
    monkeypatch.setattr(Stumbling, "stumbles", (2, 4))
    methods = ((f"{__name__}:Stumbling", {}), ("mean", {}))
    config = CONFIG.replace(aggregators=methods)
    label = f"{__name__}.Stumbling"
    result = crossval(store, config, tmp_path / "cv")
    assert [t.task for t in result.failed] == [(label, 0, 1), (label, 1, 0)]
    assert {t.error for t in result.failed} == {"RuntimeError: stumbled here"}
    folds = [r for r in rows_of(tmp_path / "cv" / "folds.csv") if r["aggregator"] == label]
    assert [bool(row["error"]) for row in folds] == [False, True, False, True, False, False]
    assert folds[1]["accuracy"] == folds[1]["seconds"] == ""
    first, second = rows_of(tmp_path / "cv" / "summary.csv")
    assert (first["trainings"], first["failed"], second["trainings"]) == ("4", "2", "6")
    assert {row["tests"] for row in rows_of(tmp_path / "cv" / "comparison.csv")} == {"4"}

    counts: list[int] = []
    again = crossval(
        store, config, tmp_path / "cv", progress=lambda done, total: counts.append(done)
    )
    assert counts == [10, 11, 12]
    assert again.failed == ()
    stumbled, plain = again.summary
    assert {k: v for k, v in stumbled.items() if k not in ("aggregator", *CPU_SECONDS)} == {
        k: v for k, v in plain.items() if k not in ("aggregator", *CPU_SECONDS)
    }


def test_a_training_without_probabilities_has_failed(tmp_path: Path) -> None:
    bags = make_bags(29)
    features = make_features(bags)
    features = {b: x[:1] if b == "008" else np.repeat(x, 2, 0) for b, x in features.items()}
    features = {b: x + np.arange(len(x))[:, None, None, None] for b, x in features.items()}
    store = write_store(tmp_path / "s", bags, features)
    config = CONFIG.replace(aggregators=((f"{__name__}:Spread", {}), ("mean", {})), seeds=1)
    result = crossval(store, config, tmp_path / "cv")
    assert {t.aggregator for t in result.failed} == {f"{__name__}.Spread"}
    assert [t.error for t in result.failed if "finite probabilities" in t.error]
    assert rows_of(tmp_path / "cv" / "summary.csv")[1]["failed"] == "0"


def test_a_method_none_of_whose_trainings_ends_well_has_empty_scores(
    store: Store, tmp_path: Path
) -> None:
    train = TRAIN.replace(lr=1e3, epochs=40, weight_decay=1e3)
    config = CONFIG.replace(train=train, aggregators=METHODS, seeds=1)
    result = crossval(store, config, tmp_path / "cv")
    assert len(result.failed) == 6
    assert "expected a finite loss" in result.failed[0].error
    assert rows_of(tmp_path / "cv" / "summary.csv")[0]["auc_macro_mean"] == ""
    plot_crossval(tmp_path / "empty.png", result.summary, [])
    assert is_picture(tmp_path / "empty.png")


# --- what is refused, left out, streamed -------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 2}, "folds: expected a whole number of at least 3, got 2"),
        ({"seeds": 0}, "seeds: expected a whole number of at least 1, got 0"),
        ({"jobs": 0}, "jobs: expected a whole number of at least 1, got 0"),
        ({"aggregators": ()}, "at least one aggregator"),
        ({"aggregators": (("mean", {}), ("mean", {}))}, "mean twice"),
        ({"train": TRAIN.replace(views="all")}, "train.views: expected off, got 'all'"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CONFIG.replace(**change)


def test_mistakes_are_found_before_the_first_training(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "cv"
    with pytest.raises(UnknownNameError, match="known aggregator"):
        crossval(store, CONFIG.replace(aggregators=(("meen", {}),)), out)
    with pytest.raises(InputError, match="known option, got 'wide'"):
        crossval(store, CONFIG.replace(aggregators=(("mean", {"wide": 3}),)), out)
    with pytest.raises(InputError, match="option labels: expected no value"):
        crossval(store, CONFIG.replace(aggregators=(("dsmil", {"labels": 3}),)), out)
    heavy = TRAIN.replace(pos_weight=0)
    with pytest.raises(InputError, match="above 0 for an SVM"):
        crossval(store, CONFIG.replace(train=heavy, aggregators=(("svm", {}),)), out)
    with pytest.raises(InputError, match="known loss"):
        crossval(store, CONFIG.replace(train=TRAIN.replace(loss="bcee")), out)
    train = TRAIN.replace(schedule="step", schedule_options={"evry": 3})
    with pytest.raises(InputError, match="'evry'"):
        crossval(store, CONFIG.replace(train=train), out)
    with pytest.raises(InputError, match="at most top-3 of 3 labels"):
        crossval(store, CONFIG.replace(train=TRAIN.replace(decision="top-4")), out)
    with pytest.raises(InputError, match="one group of bags for each of 28 folds"):
        crossval(store, CONFIG.replace(folds=28), out)
    assert not out.exists()


def test_bags_without_instances_and_given_splits_are_left_out(tmp_path: Path) -> None:
    bags = with_splits(make_bags(17, task="multiclass"))
    features = make_features(bags)
    features["003"] = features["003"][:0]
    store = write_store(tmp_path / "s", bags, features, task="multiclass")
    said: list[str] = []
    config = CONFIG.replace(aggregators=(("dragn", {"unit": "L1Agg"}), ("mean", {})), seeds=1)
    result: CrossvalResult = crossval(store, config, tmp_path / "cv", warn=said.append)
    assert said[0].startswith("1 bags have no usable instance")
    assert "splits are not used" in said[1]
    assert len(rows_of(tmp_path / "cv" / "splits.csv")) == 16
    assert [row["aggregator"] for row in result.summary] == ["dragn-L1Agg", "mean"]
    record = tomllib.loads((tmp_path / "cv" / "config.toml").read_text())
    assert [m["tap"] for m in record["methods"].values()] == ["layer4", "gap"]


def test_classical_methods_are_cross_validated_beside_aggregators(
    store: Store, tmp_path: Path
) -> None:
    said: list[str] = []
    methods = (("bovw", {"words": 7}), ("mean", {}))
    config = CONFIG.replace(aggregators=methods, seeds=1)
    result = crossval(store, config, tmp_path / "cv", warn=said.append)
    assert result.failed == ()
    assert len(said) == 1  # once, not for every training
    assert re.search(r"bovw is not trained by gradients.*`epochs`", said[0])
    first, second = (rows_of(tmp_path / "cv" / "folds.csv")[k] for k in (0, 3))
    assert (first["best_epoch"], second["best_epoch"] != "") == ("", True)
    summary = rows_of(tmp_path / "cv" / "summary.csv")
    assert [row["aggregator"] for row in summary] == ["bovw-words=7", "mean"]
    with pytest.raises(InputError, match="known option, got 'depth'"):
        crossval(store, config.replace(aggregators=(("bovw", {"depth": 2}),)), tmp_path / "x")


def test_labels_that_a_stage_cannot_have_are_masked(tmp_path: Path) -> None:
    bags = [
        replace(b, labels=("actin",) if k % 3 else (), extra={"stage": "ab"[k % 3 // 2]})
        for k, b in enumerate(make_bags(19))
    ]
    store = write_store(tmp_path / "s", bags, make_features(bags))
    train = TRAIN.replace(stage_mask="both", stages={"golgi": ("b",)})
    crossval(store, CONFIG.replace(train=train, aggregators=METHODS[:1]), tmp_path / "cv")
    stage = {bag.bag_id: bag.extra["stage"] for bag in bags}
    for row in rows_of(tmp_path / "cv" / "predictions.csv"):
        assert (float(row["p_golgi"]) == 0) == (stage[row["bag_id"]] == "a")


def test_features_beyond_memory_are_streamed(store: Store, tmp_path: Path) -> None:
    said: list[str] = []
    train = TRAIN.replace(memory="1000B")
    config = CONFIG.replace(train=train, aggregators=METHODS[:1], seeds=1, jobs=2)
    crossval(store, config, tmp_path / "cv", warn=said.append)
    assert "are streamed from the store, one training at a time" in said[0]
    path = tmp_path / "cv" / "trainings" / "mean" / "seed0-fold2.json"
    before = path.read_bytes().split(b'"seconds"')[0]
    path.unlink()
    auto = config.replace(train=TRAIN.replace(memory="auto"))
    crossval(store, auto, tmp_path / "cv")  # goes on with the same blocks
    assert path.read_bytes().split(b'"seconds"')[0] == before


def test_features_in_memory_stay_there_whatever_is_free_later(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.replace(aggregators=METHODS[:1], seeds=1)
    crossval(store, config, tmp_path / "cv")
    monkeypatch.setattr(devices, "SHARE", 0)
    again = crossval(store, config.replace(seeds=2), tmp_path / "cv")
    assert again.summary[0]["trainings"] == 6
