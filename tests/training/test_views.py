"""Training on views: which rows an epoch shows, and that evaluation sees the clean ones only.

In the ``coded`` data every row holds one number that says which bag, instance and view it is, so
what a model was given can be read off its input.
"""

from __future__ import annotations

import csv
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from run_stores import LABELS, Features, make_bags, make_features, with_splits, write_store

from dragn_cache.errors import InputError
from dragn_cache.manifest import Bag
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.runs.checkpoint import load_checkpoint
from dragn_cache.runs.predict import predict_run
from dragn_cache.runs.train import train_run
from dragn_cache.store import Store
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.model import BagClassifier
from dragn_cache.training.train import Trained, train

CONFIG = TrainConfig(
    aggregator="mean", epochs=3, batch_size=7, lr=1e-2, dropout=0.0, intervals=0, seed=5
)
VIEWS = 5  # the clean one and four others
Mode = Literal["off", "random", "all"]
Row = tuple[int, int, int]
"""Bag, instance, view."""


# --- data that say what they are ---------------------------------------------------------------


def stacked(views: list[RaggedBags], training: np.ndarray) -> RaggedBags:
    """The first view's bags, then the training bags in each other view."""
    others = [view.select(torch.from_numpy(training)) for view in views[1:]]
    return RaggedBags(
        torch.cat([views[0].values, *(view.values for view in others)]),
        offsets_of(torch.cat([bags.offsets.diff() for bags in [views[0], *others]])),
    )


@pytest.fixture(scope="module")
def coded() -> LabelledBags:
    """41 bags of 1 to 13 instances; a row (2,) holds 100 · bag + instance, and its view."""
    rng = np.random.default_rng(0)
    offsets = offsets_of(torch.from_numpy(rng.integers(1, 14, 41)))
    bag = torch.repeat_interleave(offsets.diff())
    code = 100 * bag + torch.arange(len(bag)) - offsets[bag]
    views = [
        RaggedBags(torch.stack([code, torch.full_like(code, v)], 1).float(), offsets)
        for v in range(VIEWS)
    ]
    splits = tuple(b.split for b in with_splits(make_bags(41)))
    targets = (np.arange(41)[:, None] >> np.arange(6) & 1).astype(np.int8)  # the bag's number
    data = LabelledBags(views[0], targets, splits, "multilabel")
    return replace(data, stacked=stacked(views, data.rows("train")))


def rows_of(bags: RaggedBags) -> list[list[Row]]:
    """The rows of each bag."""
    rows = [(int(code) // 100, int(code) % 100, int(view)) for code, view in bags.values]
    edges = bags.offsets.tolist()
    return [rows[a:b] for a, b in pairwise(edges)]


@contextmanager
def watched() -> Iterator[tuple[list[RaggedBags], list[RaggedBags]]]:
    """The bags that models get in training and at evaluation, batch by batch."""
    training: list[RaggedBags] = []
    evaluation: list[RaggedBags] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, BagClassifier):
            (training if module.training else evaluation).append(inputs[0])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield training, evaluation
    finally:
        hook.remove()


def epochs_shown(data: LabelledBags, config: TrainConfig) -> list[list[list[Row]]]:
    """For each epoch, the rows of each bag shown in training."""
    with watched() as (training, _):
        train(data, config)
    per_epoch = len(training) // config.epochs
    return [
        [bag for batch in training[k : k + per_epoch] for bag in rows_of(batch)]
        for k in range(0, len(training), per_epoch)
    ]


def whole_bag(data: LabelledBags, bag: int) -> list[tuple[int, int]]:
    return [(bag, k) for k in range(int(data.bags.offsets.diff()[bag]))]


def weights(trained: Trained) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(trained.model.parameters())


# --- what an epoch shows -----------------------------------------------------------------------


def test_random_shows_every_training_instance_once_in_a_view_of_its_own(
    coded: LabelledBags,
) -> None:
    epochs = epochs_shown(coded, CONFIG.replace(views="random", epochs=5))
    assert len(epochs) == 5
    for bags in epochs:
        assert sorted(bag[0][0] for bag in bags) == coded.rows("train").tolist()
        for bag in bags:
            assert [row[:2] for row in bag] == whole_bag(coded, bag[0][0])
    mixed = [len({view for _, _, view in bag}) for bag in epochs[0] if len(bag) > 4]
    assert min(mixed) > 1  # not one view for the whole bag


def test_random_draws_all_views_equally_often_and_afresh_each_epoch(coded: LabelledBags) -> None:
    epochs = epochs_shown(coded, CONFIG.replace(views="random", epochs=40))
    drawn = [
        {row[:2]: row[2] for bag in epoch for row in bag} for epoch in epochs
    ]  # epoch → instance → view
    instances = len(drawn[0])
    counts = Counter(view for epoch in drawn for view in epoch.values())
    n = 40 * instances
    expected = pytest.approx(n / VIEWS, abs=5 * np.sqrt(n * 0.16))
    assert counts == dict.fromkeys(range(VIEWS), expected)
    for first, second in pairwise(drawn):
        repeated = sum(first[row] == second[row] for row in first)
        expected = pytest.approx(instances / VIEWS, abs=5 * np.sqrt(instances * 0.16))
        assert repeated == expected
    per_instance = [{epoch[row] for epoch in drawn} for row in drawn[0]]
    assert min(len(views) for views in per_instance) >= 4


def test_all_shows_every_training_bag_once_in_every_view(coded: LabelledBags) -> None:
    training = coded.rows("train").tolist()
    epochs = epochs_shown(coded, CONFIG.replace(views="all"))
    orders = []
    for bags in epochs:
        shown = [(bag[0][0], bag[0][2]) for bag in bags]
        assert sorted(shown) == [(bag, view) for bag in training for view in range(VIEWS)]
        for bag in bags:
            assert [row[:2] for row in bag] == whole_bag(coded, bag[0][0])
            assert len({view for _, _, view in bag}) == 1
        first_views = Counter(view for _, view in shown[: len(training)])
        assert len(first_views) >= 3  # shuffled together, not view after view
        orders.append(shown)
    assert orders[0] != orders[1]


def test_off_shows_the_clean_view_only_as_if_there_were_no_other(coded: LabelledBags) -> None:
    epochs = epochs_shown(coded, CONFIG)
    assert {view for bags in epochs for bag in bags for _, _, view in bag} == {0}
    with_views, without = train(coded, CONFIG), train(replace(coded, stacked=None), CONFIG)
    assert with_views.history == without.history
    assert torch.equal(weights(with_views), weights(without))


@pytest.mark.parametrize("views", ["off", "random", "all"])
def test_evaluation_sees_clean_rows_only(coded: LabelledBags, views: Mode) -> None:
    with watched() as (_, evaluation):
        train(coded, CONFIG.replace(views=views))
    seen = [row for batch in evaluation for bag in rows_of(batch) for row in bag]
    assert {view for _, _, view in seen} == {0}
    # Validation in three epochs, and all bags once at the end.
    sizes = coded.bags.offsets.diff()
    validation = int(sizes[coded.rows("validation")].sum())
    assert len(seen) == 3 * validation + int(sizes.sum())


@pytest.mark.parametrize("views", ["random", "all"])
def test_each_presentation_has_its_own_bags_targets(
    coded: LabelledBags, views: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []

    def loss(logits: torch.Tensor, targets: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if logits.requires_grad and torch.is_grad_enabled() and logits.dtype == torch.float32:
            given.append(targets)  # double precision is the search for the start
        return logits.sum() * 0

    monkeypatch.setattr("dragn_cache.training.criteria.bce", loss)
    epochs = epochs_shown(coded, CONFIG.replace(views=views))
    shown = [bag[0][0] for bags in epochs for bag in bags]
    assert (torch.cat(given).long() @ 2 ** torch.arange(6)).tolist() == shown


@pytest.mark.parametrize("views", ["random", "all"])
def test_the_seed_fixes_the_views(coded: LabelledBags, views: Mode) -> None:
    config = CONFIG.replace(views=views)
    torch.manual_seed(1)
    first = epochs_shown(coded, config)
    torch.manual_seed(2)
    assert epochs_shown(coded, config) == first
    assert epochs_shown(coded, config.replace(seed=6)) != first


def test_scaling_is_fitted_on_clean_training_instances(coded: LabelledBags) -> None:
    states = [
        train(coded, CONFIG.replace(views=views, scale="standard")).model.scaling
        for views in ("off", "random", "all")
    ]
    rows = coded.bags.select(torch.from_numpy(coded.rows("train"))).values
    for scaling in states:
        assert scaling is not None
        torch.testing.assert_close(scaling.mean, rows.mean(0))
        assert scaling.mean[1] == 0  # the column that says the view


def test_views_that_are_not_there_are_refused(coded: LabelledBags) -> None:
    message = (
        r"features: expected augmented views for `views=all`, got the clean view only; "
        r"extract with augmented views, or train with `views=off`"
    )
    with pytest.raises(InputError, match=message):
        train(replace(coded, stacked=None), CONFIG.replace(views="all"))
    with pytest.raises(InputError, match="views: expected off, random or all, got 'some'"):
        TrainConfig(views="some")  # type: ignore[arg-type]


# --- from a store to a run ---------------------------------------------------------------------


def noisy(bags: list[Bag], clean: Features, seed: int, *, lost: tuple[str, ...] = ()) -> Features:
    """Another view: noise is added in training bags; the ``lost`` splits' rows are not a number."""
    rng = np.random.default_rng(seed)
    features = {}
    for bag in bags:
        noise = rng.normal(0, 0.5, clean[bag.bag_id].shape).astype(np.float32)
        features[bag.bag_id] = clean[bag.bag_id] + (np.nan if bag.split in lost else noise)
    return features


@pytest.fixture(scope="module")
def made() -> tuple[list[Bag], Features]:
    bags = with_splits(make_bags(61))
    return bags, make_features(bags)


@pytest.fixture(scope="module")
def store(made: tuple[list[Bag], Features], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """61 bags in three views."""
    augmented = [noisy(*made, seed=k) for k in (1, 2)]
    return write_store(tmp_path_factory.mktemp("s") / "v.features", *made, augmented=augmented)


def lines(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("views", ["random", "all"])
@pytest.mark.parametrize(
    ("method", "options"), [("mean", {}), ("dragn", {"unit": "L2Agg"})], ids=["mean", "dragn"]
)
def test_augmented_rows_of_validation_and_test_bags_change_nothing(
    store: Store,
    made: tuple[list[Bag], Features],
    tmp_path: Path,
    views: Mode,
    method: str,
    options: dict[str, Any],
) -> None:
    broken = [noisy(*made, seed=k, lost=("validation", "test")) for k in (1, 2)]
    other = write_store(tmp_path / "o", *made, augmented=broken)
    config = CONFIG.replace(aggregator=method, options=options, views=views, epochs=2)
    train_run(store, config, tmp_path / "a")
    train_run(other, config, tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        # They keep digests, of all views.
        if path.name not in ("checkpoint.pt", "splits.csv", "SHA256SUMS"):
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    states = [load_checkpoint(tmp_path / run)[0].state_dict() for run in "ab"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    losses = {cell for row in lines(tmp_path / "a" / "history.csv")[1:] for cell in row[2:]}
    assert "nan" not in losses


def test_augmented_views_of_training_bags_only_are_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, list[str]]] = []
    load = Store.load

    def noted(self: Store, tap: str | None = None, **given: Any) -> Any:
        read.append((given.get("view", "0"), list(given["bags"])))
        return load(self, tap, **given)

    monkeypatch.setattr(Store, "load", noted)
    training = [bag.bag_id for bag in store.bags if bag.split == "train"]
    for views, expected in (
        ("random", [("0", store.bag_ids), ("1", training), ("2", training)]),
        ("off", [("0", store.bag_ids)]),
    ):
        read.clear()
        train_run(store, CONFIG.replace(views=views, epochs=1), tmp_path / views)
        assert read == expected


def test_what_is_shown_is_what_the_store_holds(store: Store, tmp_path: Path) -> None:
    with watched() as (training, _):
        train_run(store, CONFIG.replace(views="all", epochs=1), tmp_path / "run")
    shown = {bag.numpy().tobytes() for b in training for bag in b.values.split(b.sizes.tolist())}
    ids = [bag.bag_id for bag in store.bags if bag.split == "train"]
    expected = {store.bag(i, "gap", view=view).tobytes() for i in ids for view in ("0", "1", "2")}
    assert shown == expected
    assert len(expected) == 3 * len(ids)


@pytest.mark.parametrize("views", ["off", "random", "all"])
def test_a_run_with_views_is_reproducible_and_says_so(
    store: Store, tmp_path: Path, views: Mode
) -> None:
    config = CONFIG.replace(views=views)
    train_run(store, config, tmp_path / "a")
    train_run(store, config, tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert tomllib.loads((tmp_path / "a" / "config.toml").read_text())["train"]["views"] == views
    assert load_checkpoint(tmp_path / "a")[1].config.views == views
    predict_run(tmp_path / "a", store, tmp_path / "again")
    first, again = (lines(tmp_path / name / "predictions.csv") for name in ("a", "again"))
    assert first == again


def test_the_three_ways_train_differently(store: Store, tmp_path: Path) -> None:
    histories = []
    for views in ("off", "random", "all"):
        train_run(store, CONFIG.replace(views=views), tmp_path / views)
        histories.append((tmp_path / views / "history.csv").read_bytes())
    assert len(set(histories)) == 3


def test_bags_that_were_lost_do_not_shift_the_views(
    store: Store, made: tuple[list[Bag], Features], tmp_path: Path
) -> None:
    bags, clean = made
    lost = ("000", "003", "017", "060")
    views = [clean, *(noisy(*made, seed=k) for k in (1, 2))]
    emptied = [{b: f[:0] if b in lost else f for b, f in view.items()} for view in views]
    with_lost = write_store(tmp_path / "s", bags, emptied[0], augmented=emptied[1:])
    kept = [bag for bag in bags if bag.bag_id not in lost]
    without = write_store(tmp_path / "t", kept, views[0], augmented=views[1:])
    config = CONFIG.replace(views="random")
    train_run(with_lost, config, tmp_path / "a")
    train_run(without, config, tmp_path / "b")
    for name in ("history.csv", "metrics.json", "predictions.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_views_teach_what_does_not_matter(tmp_path: Path) -> None:
    """A channel that gives the labels away in clean training bags is another in every view."""
    bags = with_splits(make_bags(101))
    rng = np.random.default_rng(4)
    clean = make_features(bags)
    views: list[Features] = [{} for _ in range(4)]
    for bag in bags:
        golgi = "golgi" in (bag.labels or ())
        for k, view in enumerate(views):
            maps = clean[bag.bag_id].copy()
            maps[:, LABELS.index("golgi")] -= 1.0 * golgi  # a weaker sign
            told = golgi if k == 0 and bag.split == "train" else rng.random() < 0.5
            maps[:, 4] = 6.0 * told
            view[bag.bag_id] = maps
    store = write_store(tmp_path / "s", bags, views[0], augmented=views[1:])
    config = CONFIG.replace(epochs=30, lr=3e-2)
    scores = {}
    for way in ("off", "random", "all"):
        metrics = train_run(store, config.replace(views=way), tmp_path / way)
        scores[way] = metrics["test"]["auc_macro"]
    assert scores["random"] > scores["off"] + 0.05
    assert scores["all"] > scores["off"] + 0.05


def test_a_store_without_views_is_refused_before_anything_is_read(
    made: tuple[list[Bag], Features], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_store(tmp_path / "p.features", *made)
    monkeypatch.setattr(Store, "load", None)
    message = (
        r"p\.features: expected augmented views for `views=random`, got the clean view only; "
        r"extract with augmented views, or train with `views=off`"
    )
    with pytest.raises(InputError, match=message):
        train_run(plain, CONFIG.replace(views="random"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_from_before_there_were_views_is_read(store: Store, tmp_path: Path) -> None:
    train_run(store, CONFIG, tmp_path / "run")
    record = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    del record["config"]["views"]
    torch.save(record, tmp_path / "run" / "checkpoint.pt")
    (tmp_path / "run" / "SHA256SUMS").unlink()  # nor were there these
    predict_run(tmp_path / "run", store, tmp_path / "out")
    first, again = (lines(tmp_path / name / "predictions.csv") for name in ("run", "out"))
    assert first == again
