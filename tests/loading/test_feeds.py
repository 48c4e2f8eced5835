"""Feeding: every bag once, in memory or streamed; what is read ahead stays within its budget."""

from __future__ import annotations

import resource
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_stores import Features, make_bags, make_features, with_splits, write_store

from dragn_cache.devices import memory_for_features
from dragn_cache.errors import DamagedPartError, InputError
from dragn_cache.loading.feeds import ALIGNMENT, Presentations, Streamed, in_order
from dragn_cache.loading.stored import StoredBags
from dragn_cache.machine import free_memory, parse_memory
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.runs.checkpoint import read_checkpoint
from dragn_cache.runs.predict import predict_run
from dragn_cache.runs.train import train_run
from dragn_cache.store import Store
from dragn_cache.training.config import TrainConfig

BAGS = 101
CONFIG = TrainConfig(aggregator="mean", epochs=3, batch_size=7, lr=1e-2, dropout=0.3, intervals=0)


@pytest.fixture(scope="module")
def features() -> Features:
    return make_features(make_bags(BAGS), most=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, features: Features) -> Store:
    """Five parts or more of 101 bags of 1 to 5 instances."""
    path = tmp_path_factory.mktemp("feeding") / "s.features"
    store = write_store(path, with_splits(make_bags(BAGS)), features)
    assert len(store.parts) > 3
    return store


@pytest.fixture
def training() -> torch.Tensor:
    return torch.tensor([k for k in range(BAGS) if k % 5 in (0, 2)])


def stored(store: Store, rows: int) -> StoredBags:
    """All bags of the store, whose blocks are of ``rows`` instances."""
    tap = store.tap("layer4")
    offsets = offsets_of(torch.from_numpy(store.sizes(store.bag_ids)))
    return StoredBags(store, tap, tuple(store.bag_ids), offsets, 2 * rows * tap.row_bytes)


def resident(store: Store) -> RaggedBags:
    values, offsets = store.load("layer4")
    return RaggedBags(torch.from_numpy(values), torch.from_numpy(offsets))


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bags_of(batches: Iterator[tuple[RaggedBags, torch.Tensor]]) -> list[tuple[int, torch.Tensor]]:
    """Number and rows of every bag shown."""
    return [(int(rows[k]), bags.bag(k)) for bags, rows in batches for k in range(len(rows))]


# --- an epoch of training ----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 11, 37, 10**6])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_every_training_bag_is_shown_once_whole(
    store: Store, features: Features, training: torch.Tensor, rows: int, batch_size: int
) -> None:
    batches = list(Streamed(stored(store, rows), training).epoch(batch_size, generator()))
    sizes = [len(shown) for _, shown in batches]
    full, rest = divmod(len(training), batch_size)
    assert sizes == [batch_size] * full + [rest] * (rest > 0)
    shown = bags_of(iter(batches))
    assert sorted(number for number, _ in shown) == training.tolist()
    for number, values in shown:
        np.testing.assert_array_equal(values, features[f"{number:03d}"])


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [7, 41])
def test_one_block_gives_the_batches_of_resident_bags_bit_for_bit(
    store: Store, training: torch.Tensor, shuffle: bool, batch_size: int
) -> None:
    """Then both draw the same numbers: one order of the bags, and one of each batch's rows."""
    streamed = Streamed(stored(store, 10**6), training, shuffle)
    shown = Presentations(resident(store), training[None], training, shuffle)
    first, second = generator(), generator()
    for _ in range(2):
        pairs = zip(streamed.epoch(batch_size, first), shown.epoch(batch_size, second), strict=True)
        for (a, a_rows), (b, b_rows) in pairs:
            assert torch.equal(a_rows, b_rows)
            assert torch.equal(a.offsets, b.offsets)
            assert torch.equal(a.values, b.values)


def test_the_generator_alone_decides_and_each_epoch_differs(
    store: Store, training: torch.Tensor
) -> None:
    streamed, one, two = Streamed(stored(store, 37), training, True), generator(), generator()
    epochs = [[list(streamed.epoch(7, g)) for g in (one, two)] for _ in range(3)]
    for first, second in epochs:
        for (a, a_rows), (b, b_rows) in zip(first, second, strict=True):
            assert torch.equal(a_rows, b_rows)
            assert torch.equal(a.values, b.values)
    orders = [torch.cat([rows for _, rows in first]).tolist() for first, _ in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_blocks_are_drawn_from_everywhere_and_mixed(store: Store, training: torch.Tensor) -> None:
    blocks = Streamed(stored(store, 37), training).blocks(generator())
    assert len(blocks) > 2
    sizes = stored(store, 37).offsets.diff()
    assert max(int(sizes[block].sum()) for block in blocks) <= 37
    assert [len(b) > 3 and int(b.max() - b.min()) > BAGS // 3 for b in blocks[:-1]] == [True] * (
        len(blocks) - 1
    )


@pytest.mark.parametrize("shuffle", [False, True])
def test_instances_are_shuffled_within_their_bag_if_asked_to(
    store: Store, features: Features, training: torch.Tensor, shuffle: bool
) -> None:
    moved = 0
    for number, values in bags_of(
        Streamed(stored(store, 37), training, shuffle).epoch(7, generator())
    ):
        own = features[f"{number:03d}"]
        moved += not np.array_equal(values, own)
        by_pixel = [np.argsort(rows[:, 0, 0, 0]) for rows in (values.numpy(), own)]
        np.testing.assert_array_equal(values.numpy()[by_pixel[0]], own[by_pixel[1]])
    assert (moved > 10) == shuffle


# --- memory and damage -------------------------------------------------------------------------


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of loaded features that are in use while more are loaded, those included."""
    held: dict[int, int] = {}
    seen: list[int] = []
    load = Store.load

    def counted(self: Store, *args: Any, **kwargs: Any) -> Any:
        before = sum(list(held.values()))
        values, offsets = load(self, *args, **kwargs)
        key = len(seen)
        held[key] = values.nbytes
        weakref.finalize(values, held.pop, key)
        seen.append(before + values.nbytes)
        return values, offsets

    monkeypatch.setattr(Store, "load", counted)
    return seen


def test_what_is_read_stays_within_the_budget(
    store: Store, training: torch.Tensor, alive: list[int]
) -> None:
    bags = stored(store, 37)
    for batch, _ in Streamed(bags, training).epoch(7, generator()):
        assert len(batch.values)
    assert len(alive) > 2
    for batch in in_order(bags):
        assert len(batch.values)
    assert max(alive) <= bags.budget
    assert max(alive) > bags.budget / 2


def test_a_damaged_part_is_an_error_where_the_batch_was_asked_for(
    tmp_path: Path, features: Features, training: torch.Tensor
) -> None:
    store = write_store(tmp_path / "s", with_splits(make_bags(BAGS)), features)
    bags = stored(store, 37)
    part = store.part_path(2)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(DamagedPartError, match=r"00002\.h5: expected the part as it was written"):
        list(Streamed(bags, training).epoch(7, generator()))
    with pytest.raises(DamagedPartError, match=r"00002\.h5: expected the part as it was written"):
        list(in_order(bags))


# --- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 13, 4096])
@pytest.mark.parametrize("numbers", [None, [0, 1, 2, 30, 31, 80], [97, 3, 3]])
def test_evaluation_gets_the_bags_in_their_order(
    store: Store,
    features: Features,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    numbers: list[int] | None,
) -> None:
    monkeypatch.setattr("dragn_cache.loading.feeds.EVALUATION_ROWS", rows)
    chosen = None if numbers is None else torch.tensor(numbers)
    wanted = np.concatenate([features[f"{k:03d}"] for k in numbers or range(BAGS)])
    for bags in (resident(store), stored(store, 37)):
        values = np.concatenate([batch.values.numpy() for batch in in_order(bags, chosen)])
        np.testing.assert_array_equal(values, wanted)


def test_neighbours_in_memory_are_a_view_if_they_begin_where_a_copy_would(store: Store) -> None:
    bags = resident(store)
    begins = [bags.bag(k).data_ptr() % ALIGNMENT == 0 for k in range(BAGS)]
    for inside in (True, False):
        first = begins.index(inside, 5)
        (batch,) = in_order(bags, torch.arange(first, first + 24))
        assert (batch.values.data_ptr() == bags.bag(first).data_ptr()) == inside
        assert batch.values.data_ptr() % ALIGNMENT == 0
        assert torch.equal(batch.offsets, bags.offsets[first : first + 25] - bags.offsets[first])
        assert torch.equal(batch.bag(23), bags.bag(first + 23))


@pytest.mark.parametrize("numbers", [None, [0, 1, 2, 30, 31, 80], list(range(7, 95))])
def test_both_ways_evaluate_the_same_batches_in_memory_that_begins_alike(
    store: Store, monkeypatch: pytest.MonkeyPatch, numbers: list[int] | None
) -> None:
    monkeypatch.setattr("dragn_cache.loading.feeds.EVALUATION_ROWS", 37)
    chosen = None if numbers is None else torch.tensor(numbers)
    streamed = stored(store, 56)  # rows of half the budget: a third is 37
    pairs = list(zip(in_order(resident(store), chosen), in_order(streamed, chosen), strict=True))
    assert (len(pairs) > 1) == (numbers is None or len(numbers) > 30)
    for ours, theirs in pairs:
        assert torch.equal(ours.offsets, theirs.offsets)
        assert torch.equal(ours.values, theirs.values)
        assert {b.values.data_ptr() % ALIGNMENT for b in (ours, theirs)} == {0}


# --- from a store to a run ---------------------------------------------------------------------


def needed(store: Store, tap: str) -> int:
    return int(store.sizes(store.bag_ids).sum()) * store.tap(tap).row_bytes


METHODS = {
    "mean": ("gap", {}),
    "abmil": ("gap", {"embed": (11, 7)}),
    "dragn": ("layer4", {"unit": "L3Agg"}),
}


def both_ways(store: Store, method: str, out: Path) -> tuple[Path, Path]:
    """A run in memory, and one that streams in a budget of nine tenths of the features.

    Half of them hold the training bags, 40 % of all, as one block.
    """
    tap, options = METHODS[method]
    config = CONFIG.replace(aggregator=method, options=options, tap=tap)
    memory = f"{int(0.9 * needed(store, tap))}B"
    told: list[str] = []
    train_run(store, config, out / "resident", warn=told.append)
    assert told == []
    train_run(store, config.replace(memory=memory), out / "streamed", warn=told.append)
    (line,) = told
    assert line.startswith(f"the features of {tap} (")
    assert line.endswith("they are streamed from the store")
    return out / "resident", out / "streamed"


@pytest.fixture
def touchy_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers whose digits depend on how many rows there are, and on where they begin.

    So it is, in the last digit, with products on one processor or another.
    """
    linear = F.linear

    def touchy(x: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        return linear(x, *weights) * (1 + 1e-6 * (len(x) % 7 + x.data_ptr() % 64))

    monkeypatch.setattr(F, "linear", touchy)


@pytest.mark.usefixtures("touchy_products")
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_streams_in_one_block_equals_a_resident_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The budget holds three batches of evaluation as well: then both ways compute the same."""
    monkeypatch.setattr("dragn_cache.loading.feeds.EVALUATION_ROWS", 37)
    ways = both_ways(store, method, tmp_path)
    for name in ("history.csv", "metrics.json", "predictions.csv", "splits.csv"):
        first, second = (way / name for way in ways)
        assert first.read_bytes() == second.read_bytes(), name


@pytest.mark.parametrize("method", METHODS)
def test_smaller_batches_of_evaluation_change_rounding_only(
    store: Store, tmp_path: Path, method: str
) -> None:
    """All 314 instances are one batch in memory, and too many for a third of the budget.

    Products of another shape may add up in another order (they do on Intel's processors), so
    predictions agree to single precision, not bit for bit.
    """
    ways = both_ways(store, method, tmp_path)
    for name, first in (("history.csv", 0), ("predictions.csv", 5)):
        ours, theirs = (
            np.genfromtxt(way / name, delimiter=",", skip_header=1)[:, first:] for way in ways
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("method", ["dragn", "abmil"])
def test_a_run_that_streams_is_reproducible_and_predicts_what_it_did(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    tap = "layer4" if method == "dragn" else "gap"
    options = {"embed": (11, 7)} if method == "abmil" else {"unit": "L1Agg"}
    memory = f"{needed(store, tap) // 7}B"
    config = CONFIG.replace(
        aggregator=method, options=options, tap=tap, memory=memory, scale="standard"
    )
    train_run(store, config, tmp_path / "a")
    train_run(store, config, tmp_path / "b")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert read_checkpoint(tmp_path / "a").config.memory == memory
    predict_run(tmp_path / "a", store, tmp_path / "resident")
    fifth = needed(store, tap) // 5
    monkeypatch.setattr("dragn_cache.runs.predict.memory_for_features", lambda *_: fifth)
    told: list[str] = []
    predict_run(tmp_path / "a", store, tmp_path / "streamed", warn=told.append)
    assert "they are streamed" in told[0]
    assert "training or validation" in told[1]
    first, second = (
        np.genfromtxt(tmp_path / way / "predictions.csv", delimiter=",", skip_header=1)[:, 5:]
        for way in ("resident", "streamed")
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_views_that_do_not_fit_are_refused_with_the_remedy(
    tmp_path: Path, features: Features
) -> None:
    bags = with_splits(make_bags(BAGS))
    store = write_store(tmp_path / "s", bags, features, augmented=[features] * 2)
    for share in (0.5, 1.2):  # the clean view does not fit; it does, but not all
        memory = f"{int(share * needed(store, 'gap'))}B"
        with pytest.raises(
            InputError, match=r"views: .* for all; train with `views=off`, or with `memory="
        ):
            train_run(store, CONFIG.replace(views="all", memory=memory), tmp_path / "r")
    train_run(store, CONFIG.replace(views="all", memory="1MB"), tmp_path / "r")


# --- how much there is -------------------------------------------------------------------------


def test_sizes_of_memory_are_read() -> None:
    sizes = {"8GB": 8 * 10**9, "1.5g": 15 * 10**8, "500MB": 5 * 10**8, "7kB": 7000, "4096B": 4096}
    assert {text: parse_memory(text) for text in sizes} == sizes
    assert parse_memory("auto") is None
    for text in ("", "much", "0", "0GB", "-1GB", "8GiB", "nan", "8"):
        with pytest.raises(
            InputError, match=r"^memory: expected auto or a size with its unit, as 8GB, got "
        ):
            TrainConfig(memory=text)


def test_free_memory_is_the_least_of_the_machines_and_the_groups(tmp_path: Path) -> None:
    group = tmp_path / "sys" / "fs" / "cgroup"
    (tmp_path / "proc").mkdir()
    group.mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    7000 kB\n")
    assert free_memory(tmp_path) == 7000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5\n")
    assert free_memory(tmp_path) == 7000 * 1024
    (group / "memory.max").write_text("1005\n")
    assert free_memory(tmp_path) == 1000
    (group / "memory.stat").write_text("active_file 7\ninactive_file 3\n")
    assert free_memory(tmp_path) == 1003
    assert memory_for_features("300B", torch.device("cpu")) == 300
    assert 0 < memory_for_features("auto", torch.device("cpu")) < free_memory()


def test_free_memory_is_no_more_than_a_process_may_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable:    7000 kB\n")
    (tmp_path / "proc" / "self" / "status").write_text("VmSize:\t 900 kB\nVmData:\t 300 kB\n")
    limits = {resource.RLIMIT_AS: 5000 * 1024, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], -1))
    assert free_memory(tmp_path) == 4100 * 1024
    limits[resource.RLIMIT_DATA] = 1000 * 1024
    assert free_memory(tmp_path) == 700 * 1024


# --- one gather --------------------------------------------------------------------------------


def test_shuffling_with_the_choice_is_shuffling_after_it(store: Store) -> None:
    bags = resident(store)
    numbers = torch.tensor([5, 99, 5, 17])
    at_once = bags.select(numbers, shuffle=generator())
    assert torch.equal(at_once.values, bags.select(numbers).permuted(generator()).values)
    views = torch.stack([numbers, numbers])
    at_once = bags.mixed(views, g := generator(), shuffle=True)
    h = generator()
    assert torch.equal(at_once.values, bags.mixed(views, h).permuted(h).values)
    assert torch.equal(g.get_state(), h.get_state())
    edges = at_once.offsets.tolist()
    assert [b - a for a, b in pairwise(edges)] == bags.offsets.diff()[numbers].tolist()
