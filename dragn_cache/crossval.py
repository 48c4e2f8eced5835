"""Cross-validation: several methods on the same folds of one store, without a leak.

OUT/
  config.toml        every setting, resolved, and the digests of features and bags
  trainings/         one small file for each method, seed and fold that is finished
  splits.csv         bag_id, group, and the fold of each seed
  folds.csv          one row for each method, seed and fold: all scores
  summary.csv        one row for each method: means, deviations, 95 % intervals
  comparison.csv     every two methods, paired by fold
  predictions.csv    every bag's probabilities when it was tested
  crossval.png       the main scores

- In fold f of a seed, fold f is the test, the next one validation, the rest training: validation
  chooses the epoch, test only reports. Groups are whole; all methods see the same folds.
- A training depends on its method, seed and fold alone, and computes on one thread, so the results
  are the same however many run at once, and whenever the work was interrupted.
- Features lie in memory once, whatever the number of processes.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dragn_cache.bags import RaggedBags, offsets_of
from dragn_cache.classical import CLASSICAL
from dragn_cache.config import CrossvalConfig, TrainConfig, usable_cores
from dragn_cache.crossval_folder import begin, read_config, read_training, write_training
from dragn_cache.crossval_tables import (
    COMPARISON,
    Row,
    Task,
    Training,
    Truth,
    comparison_rows,
    fold_row,
    summary_row,
)
from dragn_cache.decisions import check_rule_for, decide
from dragn_cache.devices import find_device
from dragn_cache.errors import DragnCacheError, StoreError
from dragn_cache.feeding import StoredBags, in_order, memory_for_features
from dragn_cache.labelling import (
    Labelling,
    Warn,
    choose_tap,
    hex_digests,
    possible_in,
    read_labelling,
    require_labels,
    tell_twins,
    tell_vectors,
    usable_bags,
)
from dragn_cache.methods import Model, check_method, fit_method, settings_read, without_unread
from dragn_cache.processes import SharedArray, run_tasks
from dragn_cache.runs import write_csv
from dragn_cache.splits import check_split, make_folds
from dragn_cache.store import Store, json_digest
from dragn_cache.store.schema import KINDS
from dragn_cache.train import LabelledBags, positive_weights

Progress = Callable[[int, int], None]
"""Called with trainings done (those of earlier calls included) and trainings in total."""


# What trainings import at their first use, which takes seconds that are not theirs: PyTorch's
# optimizers the second, classical methods the others.
PRELOAD = (__name__, "torch._dynamo")
PRELOAD_CLASSICAL = ("sklearn.cluster", "sklearn.mixture", "sklearn.svm")


@dataclass(frozen=True)
class CrossvalResult:
    """What a cross-validation came to: the rows of its tables, and the trainings that failed."""

    summary: tuple[Row, ...]
    comparison: tuple[Row, ...]
    failed: tuple[Training, ...]


def crossval(
    store: Store,
    config: CrossvalConfig,
    out: Path,
    *,
    bags_csv: Path | None = None,
    progress: Progress = lambda done, total: None,
    warn: Warn = lambda text: None,
) -> CrossvalResult:
    """Train every method on every fold of every seed, and write the tables.

    Called again with the same settings, it goes on where it was interrupted and tries failed
    trainings again. Methods and seeds may be added; the rule of decision
    and the number of resamples may change.

    Args:
        bags_csv: other labels or groups for the store's bags.
        progress: see `Progress`.
        warn: called with one line for everything that was left out.

    Raises:
        InputError: the labels, an option or the number of groups cannot be used, or ``out`` holds
            something else.
        StoreMismatchError: ``out`` was begun with other settings, features or bags.
        StoreError: the store is incomplete or damaged.
    """
    work = _plan(store, config, bags_csv, out, warn)
    tasks = work.tasks()
    done = {task: found for task in tasks if (found := read_training(out, task)) is not None}
    waiting = [task for task in tasks if task not in done]
    progress(len(done), len(tasks))
    with closing(_train_all(work, waiting, _jobs(config, work))) as finished:
        for training in finished:
            write_training(out, training)
            done[training.task] = training
            progress(len(done), len(tasks))
    return _report(out, work, [done[task] for task in tasks], config.train.intervals)


# --- what is to be done ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """Everything that trainings share.

    Attributes:
        methods: their settings by label, taps resolved.
        features: by tap, the bags: in their store, in memory, or in memory that processes share.
        sizes: (B,) instances of each bag.
        streamed: whether features stay in their store.
        possible: (B, L), the labels that a bag can have, where a stage mask asks for that.
    """

    methods: Mapping[str, TrainConfig]
    features: Mapping[str, StoredBags | RaggedBags | SharedArray]
    labelling: Labelling
    sizes: NDArray[np.int64]
    truth: Truth
    streamed: bool
    possible: NDArray[np.bool_] | None

    def tasks(self) -> list[Task]:
        """In the order of work: fold by fold, so that all methods have results early."""
        seeds, folds = range(len(self.truth.folds)), range(self.truth.count)
        return [(label, s, f) for s in seeds for f in folds for label in self.methods]

    def data(self, task: Task) -> LabelledBags:
        """What one training trains on."""
        label, seed, fold = task
        bags = self.features[self.methods[label].tap or ""]
        if isinstance(bags, SharedArray):
            bags = RaggedBags(torch.from_numpy(bags.array), _offsets(self.sizes))
        splits = tuple(self.truth.splits(seed, fold).tolist())
        groups = tuple(bag.group for bag in self.labelling.bags)
        truth = self.truth
        return LabelledBags(
            bags, truth.targets, splits, truth.task, groups=groups, possible=self.possible
        )


def training_seed(seed: int, fold: int) -> int:
    """The seed of a training: 32 bits that NumPy's ``SeedSequence`` makes of both."""
    return int(np.random.SeedSequence((seed, fold)).generate_state(1)[0])


def _plan(
    store: Store, config: CrossvalConfig, bags_csv: Path | None, out: Path, warn: Warn
) -> _Work:
    """Check everything before the first training, and begin or take up the folder."""
    store.require_complete()
    labelling = read_labelling(store, bags_csv)
    require_labels(labelling)
    check_rule_for(config.train.decision, labelling.task, len(labelling.labels))
    labelling, sizes = usable_bags(store, labelling, warn)
    if any(bag.split for bag in labelling.bags):
        warn("the table's splits are not used: cross-validation makes its own")
    methods = {label: without_unread(m, warn) for label, m in config.methods.items()}
    taps = {label: choose_tap(store, method) for label, method in methods.items()}
    methods = {label: replace(m, tap=taps[label].name) for label, m in methods.items()}
    for label, method in methods.items():
        tell_vectors(taps[label], method, warn)
    digests = hex_digests(store, labelling.ids)
    tell_twins(labelling, digests, warn)
    before = read_config(out)
    used = {tap.name: tap for tap in taps.values()}
    needed = int(sizes.sum()) * sum(tap.row_bytes for tap in used.values())
    budget = _budget(config.train, before, needed)
    features = {
        name: StoredBags(store, tap, tuple(labelling.ids), _offsets(sizes), budget)
        for name, tap in used.items()
    }
    truth = _truth(labelling, config)
    masked = config.train.stage_mask is not None
    possible = possible_in(store, labelling, config.train) if masked else None
    work = _Work(methods, features, labelling, sizes, truth, needed > budget, possible)
    _check_methods(work)
    if work.streamed:
        warn(
            f"the features of {', '.join(used)} ({needed / 1e9:.3g} GB) are more than the "
            f"{budget / 1e9:.3g} GB of memory for them: they are streamed from the store, "
            "one training at a time"
        )
    begin(out, before, _record(work, config, store, digests, budget))
    return work


def _budget(config: TrainConfig, before: dict[str, Any], needed: int) -> int:
    """Bytes that features may fill; the work goes on as it began, whatever is free now."""
    device = find_device(config.device)
    if not before or config.memory != "auto":
        return memory_for_features(config.memory, device)
    began = before["crossval"].get("memory")
    return memory_for_features(began, device) if began else needed


def _truth(labelling: Labelling, config: CrossvalConfig) -> Truth:
    """The folds of every seed; no group is on two sides of any of them."""
    groups, targets = [bag.group for bag in labelling.bags], labelling.targets()
    folds = [
        make_folds(labelling.ids, targets, groups, folds=config.folds, seed=seed)
        for seed in range(config.seeds)
    ]
    rule = config.train.decision
    labels, task = labelling.labels, labelling.task
    truth = Truth(targets, labels, task, rule, np.stack(folds), config.folds)
    for seed in range(config.seeds):
        for fold in range(config.folds):
            check_split(labelling.ids, truth.splits(seed, fold).tolist(), groups)
    return truth


def _check_methods(work: _Work) -> None:
    """Raise the error that every training of a method would raise."""
    for label, method in work.methods.items():
        data = work.data((label, 0, 0))
        check_method(method, data.bags.in_shape, data.targets.shape[1])
        positive_weights(data, method, find_device(method.device))


def _offsets(sizes: NDArray[np.int64]) -> torch.Tensor:
    return offsets_of(torch.from_numpy(sizes))


# --- training ----------------------------------------------------------------------------------


def _jobs(config: CrossvalConfig, work: _Work) -> int:
    """How many trainings run at once: as asked for, else one for each core, or one on a GPU."""
    if work.streamed:
        return 1
    if config.jobs is not None:
        return config.jobs
    return usable_cores() if find_device(config.train.device).type == "cpu" else 1


def _train_all(work: _Work, tasks: Sequence[Task], jobs: int) -> Generator[Training, None, None]:
    """Trainings in the order of their end."""
    if not tasks:
        return
    jobs = min(jobs, len(tasks))
    loaded = work if work.streamed else replace(work, features=_loaded(work, jobs))
    classical = any(method.aggregator in CLASSICAL for method in work.methods.values())
    preload = PRELOAD + (PRELOAD_CLASSICAL if classical else ())
    if jobs > 1:
        yield from run_tasks(_train_one, loaded, tasks, jobs=jobs, preload=preload)
        return
    for name in preload:
        importlib.import_module(name)
    for task in tasks:
        yield _train_one(loaded, task)


def _loaded(work: _Work, jobs: int) -> dict[str, RaggedBags | SharedArray]:
    """All features in memory, once."""
    loaded: dict[str, RaggedBags | SharedArray] = {}
    for name, stored in work.features.items():
        assert isinstance(stored, StoredBags)
        if jobs == 1:
            loaded[name] = stored.read(torch.arange(len(stored)))
            continue
        shared = SharedArray((int(work.sizes.sum()), *stored.in_shape), stored.tap.dtype)
        row = 0
        for bags in in_order(stored):  # some at a time, so that there is never a second copy
            shared.array[row : row + len(bags.values)] = bags.values.numpy()
            row += len(bags.values)
        loaded[name] = shared
    return loaded


def _train_one(work: _Work, task: Task) -> Training:
    """One training; an error of its own is its result, one of the store is raised."""
    label, seed, fold = task
    config = replace(work.methods[label], seed=training_seed(seed, fold))
    data = work.data(task)
    notes: list[str] = []
    started = time.perf_counter()
    try:
        with one_thread():
            trained = fit_method(data, config, labels=work.labelling.labels, warn=notes.append)
    except StoreError:
        raise
    except Exception as error:  # noqa: BLE001 - recorded and reported; the others go on
        kind = "" if isinstance(error, DragnCacheError) else f"{type(error).__name__}: "
        return Training(label, seed, fold, error=" ".join(f"{kind}{error}".split()))
    test, validation = (
        tuple(map(tuple, trained.probabilities[data.rows(split)].tolist()))
        for split in ("test", "validation")
    )
    return Training(
        label,
        seed,
        fold,
        probabilities=test,
        validation=validation,
        best_epoch=trained.best_epoch,
        parameters=_parameters(trained.model),
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _parameters(model: Model) -> int:
    """How many numbers a model has learned."""
    if isinstance(model, torch.nn.Module):
        return sum(p.numel() for p in model.parameters())
    return sum(x.numel() for x in model.state_dict().values())


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch and NumPy on one thread: sums run in one order, whatever the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


# --- settings and tables ------------------------------------------------------------------------

# Not among a method's settings: each training has its own seed, and the rest concerns all.
NOT_COMPARED = ("seed", "intervals", "decision", "memory")


def _record(
    work: _Work, config: CrossvalConfig, store: Store, digests: Sequence[str], budget: int
) -> dict[str, Any]:
    """config.toml: what the results depend on; ``digests`` are those of the bags' features."""
    description, labelling = store.description, work.labelling
    bags = [(bag.bag_id, sorted(bag.labels or ()), bag.group) for bag in labelling.bags]
    record: dict[str, Any] = {
        "crossval": {
            "folds": config.folds,
            "seeds": config.seeds,
            "intervals": config.train.intervals,
            "decision": config.train.decision,
        },
        "data": {
            "name": store.name,
            "task": labelling.task,
            "labels": list(labelling.labels),
            "bags": json_digest(bags),
            "content": json_digest(digests),
            "instances": int(work.sizes.sum()),
            "revision": description.revision,
            **{kind: description.digest(kind) for kind in KINDS},
        },
        "methods": {label: _settings(method) for label, method in work.methods.items()},
    }
    if work.possible is not None:
        record["data"]["possible"] = json_digest(work.possible.tolist())
    if work.streamed:  # the order of training depends on the blocks
        record["crossval"]["memory"] = f"{budget}B"
    return record


def _settings(config: TrainConfig) -> dict[str, Any]:
    read = settings_read(config).items()
    given: dict[str, Any] = _without_none({k: v for k, v in read if k not in NOT_COMPARED})
    return given


def _without_none(value: Any) -> Any:
    """What TOML can hold."""
    if not isinstance(value, Mapping):
        return value
    return {k: _without_none(v) for k, v in value.items() if v is not None}


def _report(
    out: Path, work: _Work, trainings: Sequence[Training], intervals: int
) -> CrossvalResult:
    """Write the tables and the picture."""
    from dragn_cache.plots import plot_crossval  # here: processes that train do without

    by_method: dict[str, list[Training]] = {label: [] for label in work.methods}
    for training in trainings:
        by_method[training.aggregator].append(training)
    rows = {label: [fold_row(t, work.truth) for t in own] for label, own in by_method.items()}
    summary = [
        summary_row(own, rows[label], work.truth, intervals) for label, own in by_method.items()
    ]
    fold_rows = [row for own in rows.values() for row in own]
    comparison = comparison_rows(fold_rows)
    _write_splits(out / "splits.csv", work)
    _write_predictions(out / "predictions.csv", work, by_method)
    write_csv(out / "folds.csv", list(fold_rows[0]), (row.values() for row in fold_rows))
    write_csv(out / "comparison.csv", COMPARISON, (row.values() for row in comparison))
    plot_crossval(out / "crossval.png", summary, fold_rows)
    write_csv(out / "summary.csv", list(summary[0]), (row.values() for row in summary))
    failed = tuple(training for training in trainings if training.error)
    return CrossvalResult(tuple(summary), tuple(comparison), failed)


def _write_splits(path: Path, work: _Work) -> None:
    folds = work.truth.folds
    write_csv(
        path,
        ["bag_id", "group", *(f"fold_seed{seed}" for seed in range(len(folds)))],
        (
            [bag.bag_id, bag.group, *own]
            for bag, own in zip(work.labelling.bags, folds.T.tolist(), strict=True)
        ),
    )


def _write_predictions(path: Path, work: _Work, by_method: Mapping[str, list[Training]]) -> None:
    labels, ids = work.labelling.labels, work.labelling.ids

    def rows() -> Iterator[list[Any]]:
        for training in (t for own in by_method.values() for t in own if not t.error):
            tested = work.truth.tested(training)
            p = tested.probabilities
            d = decide(p, work.truth.task, tested.decision).tolist()
            for k, row in enumerate(tested.rows.tolist()):
                y, said = tested.targets[k].tolist(), map(repr, p[k].tolist())
                yield [*training.task, ids[row], *y, *said, *d[k]]

    head = ["aggregator", "seed", "fold", "bag_id"]
    columns = [f"{kind}_{label}" for kind in "ypd" for label in labels]
    write_csv(path, [*head, *columns], rows())
