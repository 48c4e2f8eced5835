"""Runs: labels joined with features, trained, and written to a folder that explains itself.

RUN/
  config.toml      every setting, resolved
  splits.csv       bag_id, split, group
  history.csv      loss by epoch; without epochs selection.csv, how each label's SVM was chosen
  metrics.json     every score for train, validation and test, with 95 % intervals
  predictions.csv  bag_id, split, y_<label>…, p_<label>…, d_<label>… (truth, probability, decision)
  checkpoint.pt    weights or machines, how to decide, the digests of the features and bags used
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray

from dragn_cache.bags import RaggedBags, offsets_of
from dragn_cache.classical import Choice
from dragn_cache.config import TrainConfig
from dragn_cache.decisions import Decision, check_rule_for, choose_decision, decide
from dragn_cache.devices import find_device
from dragn_cache.errors import InputError, StoreMismatchError, UnknownNameError
from dragn_cache.feeding import StoredBags, memory_for_features
from dragn_cache.files import is_unfinished, write_bytes, write_text
from dragn_cache.manifest import SPLITS, Bag, Task, check_bags, columns_given, read_bags
from dragn_cache.methods import (
    ClassicalFitted,
    Fitted,
    Model,
    fit_method,
    load_model,
    method_facts,
    predict_method,
    settings_read,
    without_unread,
)
from dragn_cache.metrics import evaluate
from dragn_cache.splits import check_split, make_split
from dragn_cache.stages import possible_labels
from dragn_cache.store import Store, Tap, differences
from dragn_cache.store.schema import CLEAN_VIEW
from dragn_cache.tables import Row, read_table
from dragn_cache.train import LabelledBags, Progress, no_views

CHECKPOINT_VERSION = 1
# What zipfile and torch.load raise on bytes that torch.save did not write.
CHECKPOINT_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Labelling:
    """Labels of some of a store's bags: what is learned, and on which side each bag is."""

    bags: tuple[Bag, ...]
    labels: tuple[str, ...]
    task: Task

    @property
    def ids(self) -> list[str]:
        return [bag.bag_id for bag in self.bags]

    def targets(self) -> NDArray[np.int8]:
        """(B, L) of 0 and 1."""
        column = {label: k for k, label in enumerate(self.labels)}
        targets = np.zeros((len(self.bags), len(self.labels)), np.int8)
        for row, bag in enumerate(self.bags):
            for label in bag.labels or ():
                targets[row, column[label]] = 1
        return targets


def run_name(store: Path, config: TrainConfig) -> str:
    """A folder name for a run: the store, the method and its options, the seed."""
    return f"{store.name.removesuffix('.features')}-{config.label}-s{config.seed}"


def train_run(
    store: Store,
    config: TrainConfig,
    out: Path,
    *,
    bags_csv: Path | None = None,
    progress: Progress | None = None,
    warn: Warn = lambda text: None,
) -> dict[str, Any]:
    """Train on a store and write a run folder.

    Args:
        bags_csv: other labels, splits or groups for the store's bags.
        warn: called with one line for everything that was left out.

    Returns:
        the metrics, as in metrics.json.

    Raises:
        InputError: the labels, the split or an option cannot be used, the store lacks the views
            asked for, or ``out`` holds a run.
        StoreError: the store is incomplete or damaged.
    """
    require_new(out)
    store.require_complete()
    config = without_unread(config, warn)
    if config.views != "off" and len(store.description.views) == 1:
        raise no_views(config, str(store.path))
    tap = choose_tap(store, config)
    tell_vectors(tap, config, warn)
    labelling = read_labelling(store, bags_csv)
    require_labels(labelling)
    check_rule_for(config.decision, labelling.task, len(labelling.labels))
    labelling, data = _load_labelled(store, tap, labelling, config, warn)
    splits = data.splits
    tell_twins(store, labelling, warn, splits)
    trained = fit_method(data, config, labels=labelling.labels, progress=progress, warn=warn)
    p, chosen = trained.probabilities, data.rows("validation")
    decision = choose_decision(config.decision, data.task, data.targets[chosen], p[chosen])
    tell_kept(decision, labelling.labels, warn)
    metrics = {
        split: _scores(data.targets, p, data.rows(split), data.task, decision, config)
        for split in SPLITS
    }
    if isinstance(data.bags, StoredBags):  # the order of training depends on the blocks
        config = replace(config, memory=f"{data.bags.budget}B")
    config = replace(config, tap=tap.name)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.toml", _config_toml(config, labelling, store))
    groups = [bag.group for bag in labelling.bags]
    write_csv(
        out / "splits.csv",
        ["bag_id", "split", "group"],
        zip(labelling.ids, splits, groups, strict=True),
    )
    _write_course(out, trained, labelling.labels)
    write_predictions(out / "predictions.csv", labelling, splits, p, decision)
    _write_checkpoint(out / "checkpoint.pt", trained, config, labelling, store, decision, splits)
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def predict_run(
    run: Path,
    store: Store,
    out: Path,
    *,
    bags_csv: Path | None = None,
    device: str = "cpu",
    warn: Warn = lambda text: None,
) -> dict[str, Any] | None:
    """Apply a run's model to a store's bags; write predictions.csv and, with labels, metrics.json.

    Returns:
        the scores over all labelled bags, or None when the bags carry no labels.

    Raises:
        InputError: there is no usable checkpoint, or ``out`` holds files.
        StoreMismatchError: the store's features are not those that the model was trained on.
        StoreError: the store is incomplete or damaged.
    """
    require_new(out)
    target = find_device(device)
    model, record = load_checkpoint(run)
    refuse_other_features(run, record, store, warn)
    store.require_complete()
    labelling = _labelling_for(record, store, bags_csv, warn)
    labelling, probabilities = apply_model(model, record, store, labelling, target, warn)
    decision = decision_of(record)
    out.mkdir(parents=True, exist_ok=True)
    splits = [bag.split for bag in labelling.bags]
    write_predictions(out / "predictions.csv", labelling, splits, probabilities, decision)
    if any(bag.labels is None for bag in labelling.bags):
        return None
    known = set(record.get("seen", {}).values())
    trained = sum(digest in known for digest in hex_digests(store, labelling.ids))
    if trained:
        warn(
            f"{trained} of these {len(labelling.bags)} bags were in the run's training or "
            f"validation: score new ones, or dragn-cache evaluate {run}"
        )
    rows, config = np.arange(len(labelling.bags)), TrainConfig(**record["config"])
    scores = _scores(labelling.targets(), probabilities, rows, labelling.task, decision, config)
    write_text(out / "metrics.json", json.dumps({"all": scores}, indent=2) + "\n")
    return scores


def apply_model(
    model: Model,
    record: dict[str, Any],
    store: Store,
    labelling: Labelling,
    device: torch.device,
    warn: Warn,
) -> tuple[Labelling, NDArray[np.float64]]:
    """Probabilities (B, L) of a store's bags; those without a usable instance are left out.

    Labels that a bag's stage cannot have are 0 if the run masks predictions.
    """
    memory = memory_for_features("auto", device)
    labelling, bags = load_bags(store, store.tap(record["tap"]), labelling, memory, warn)
    probabilities = predict_method(model, bags, labelling.task, device)
    config = TrainConfig(**record["config"])
    if config.masks_predictions:
        probabilities = np.where(possible_in(store, labelling, config), probabilities, 0.0)
    return labelling, probabilities


def _labelling_for(
    record: dict[str, Any], store: Store, bags_csv: Path | None, warn: Warn
) -> Labelling:
    """The bags to predict, with the run's labels; without any, where they carry other labels."""
    if bags_csv is None:
        used = {label for bag in store.bags for label in bag.labels or ()}
        if not used <= set(record["labels"]):
            warn("the store's labels are not the run's: predictions without scores")
            bags = tuple(replace(bag, labels=None) for bag in store.bags)
            return Labelling(bags, tuple(record["labels"]), record["task"])
    return read_labelling(store, bags_csv, labels=record["labels"], task=record["task"])


def require_new(out: Path) -> None:
    """Raise `InputError` unless a folder is empty or does not exist yet.

    A file that a kill left unfinished is none.
    """
    if out.exists() and (not out.is_dir() or not all(map(is_unfinished, out.iterdir()))):
        got = "one with files" if out.is_dir() else "a file"
        raise InputError(str(out), expected="a new folder", got=got, remedy="give another --out")


# --- joining labels and features ---------------------------------------------------------------


def choose_tap(store: Store, config: TrainConfig) -> Tap:
    """The tap asked for, else a map for methods that need maps and a vector for the rest."""
    if config.tap is not None:
        return store.tap(config.tap)
    wants_map = method_facts(config.aggregator).needs == "map"
    for tap in store.description.taps:
        if (len(tap.shape) == 3) == wants_map:
            return tap
    return store.tap()


def tell_vectors(tap: Tap, config: TrainConfig, warn: Warn) -> None:
    """Report a method meant for maps that is given vectors."""
    if method_facts(config.aggregator).needs == "map" and len(tap.shape) == 1:
        warn(
            f"{config.aggregator} is meant for maps: the vectors of {tap.name} are maps of a pixel"
        )


def read_labelling(
    store: Store,
    bags_csv: Path | None = None,
    *,
    labels: Sequence[str] | None = None,
    task: Task | None = None,
) -> Labelling:
    """Labels, splits and groups of a store's bags, from the store or from another table.

    A column that the other table lacks is taken from the store; one that it has counts, even where
    it is empty, so that two splits or groupings are never mixed. Bags that it lacks are left out.

    Raises:
        UnknownNameError: a bag that the store does not have.
        ManifestError: a label, a split, or a bag's number of labels that is not allowed.
    """
    if bags_csv is None:
        return _checked(Labelling(store.bags, tuple(labels or store.labels), task or store.task))
    known = {bag.bag_id: bag for bag in store.bags}
    given, found, found_task = read_bags(bags_csv)
    for bag in given:
        if bag.bag_id not in known:
            raise UnknownNameError(
                "bag",
                bag.bag_id,
                known,
                remedy=f"correct {bag.file}:{bag.line}, or extract that bag's images first",
            )
    absent = {"labels", "split", "group"} - columns_given(bags_csv)
    bags = []
    for bag in given:
        old = known[bag.bag_id]
        bags.append(replace(bag, **{name: getattr(old, name) for name in absent}))
    same = "labels" in absent or set(found) <= set(store.labels)
    order = labels or (store.labels if same else found)
    return _checked(
        Labelling(tuple(bags), tuple(order), task or (store.task if same else found_task))
    )


def _checked(labelling: Labelling) -> Labelling:
    faults = check_bags(labelling.bags, labelling.labels, labelling.task)
    if faults:
        raise faults[0].error(len(faults) - 1)
    return labelling


def require_labels(labelling: Labelling) -> None:
    """Raise `InputError` unless every bag is labelled, and one at least has a label."""
    unlabelled = [bag for bag in labelling.bags if bag.labels is None]
    if unlabelled or not labelling.labels:
        got = "no labels" if not unlabelled else f"none for bag {unlabelled[0].bag_id!r}"
        raise InputError(
            "labels",
            expected="a labels column",
            got=got,
            remedy="give a table with bag_id,labels as --bags CSV",
        )
    if not any(bag.labels for bag in labelling.bags):
        raise InputError(
            "labels",
            expected="a bag with a label",
            got=f"empty labels for all {len(labelling.bags)} bags",
            remedy="fill in the labels column",
        )


def usable_bags(
    store: Store, labelling: Labelling, warn: Warn
) -> tuple[Labelling, NDArray[np.int64]]:
    """The bags that have a usable instance, and their numbers of instances (B,)."""
    sizes = store.sizes(labelling.ids)
    kept = sizes > 0
    if kept.all():
        return labelling, sizes
    lost = [bag.bag_id for bag, keep in zip(labelling.bags, kept, strict=True) if not keep]
    warn(f"{len(lost)} bags have no usable instance and are left out: {', '.join(lost[:5])}")
    bags = tuple(b for b, keep in zip(labelling.bags, kept, strict=True) if keep)
    return replace(labelling, bags=bags), sizes[kept]


def load_bags(
    store: Store, tap: Tap, labelling: Labelling, memory: int, warn: Warn
) -> tuple[Labelling, RaggedBags | StoredBags]:
    """The features of the labelled bags; bags without a usable instance are left out.

    Args:
        memory: bytes that they may fill; larger ones stay in the store.
    """
    labelling, sizes = usable_bags(store, labelling, warn)
    needed = int(sizes.sum()) * tap.row_bytes
    if needed > memory:
        warn(
            f"the features of {tap.name} ({needed / 1e9:.3g} GB) are more than the "
            f"{memory / 1e9:.3g} GB of memory for them: they are streamed from the store"
        )
        offsets = offsets_of(torch.from_numpy(sizes))
        return labelling, StoredBags(store, tap, tuple(labelling.ids), offsets, memory)
    values, bounds = store.load(tap.name, bags=labelling.ids)
    return labelling, RaggedBags(torch.from_numpy(values), torch.from_numpy(bounds))


def _load_labelled(
    store: Store, tap: Tap, labelling: Labelling, config: TrainConfig, warn: Warn
) -> tuple[Labelling, LabelledBags]:
    """Everything that training needs; augmented views, if asked for, of training bags only."""
    memory = memory_for_features(config.memory, find_device(config.device))
    labelling, bags = load_bags(store, tap, labelling, memory, warn)
    splits = tuple(choose_splits(labelling, config.seed))
    stacked = None
    if config.views != "off":
        training = [k for k, split in enumerate(splits) if split == "train"]
        rows = bags.offsets.diff()
        copies = int(rows[training].sum()) * (len(store.description.views) - 1)
        needed = (int(rows.sum()) + copies) * tap.row_bytes
        if isinstance(bags, StoredBags) or needed > memory:
            raise _views_too_large(config, needed, memory)
        stacked = stack_views(store, tap, bags, labelling.ids, training)
        bags = stacked.first(len(bags))  # so that the loaded copy goes
    data = LabelledBags(
        bags,
        labelling.targets(),
        splits,
        labelling.task,
        stacked,
        groups=tuple(bag.group for bag in labelling.bags),
        possible=None if config.stage_mask is None else possible_in(store, labelling, config),
    )
    return labelling, data


def possible_in(store: Store, labelling: Labelling, config: TrainConfig) -> NDArray[np.bool_]:
    """(B, L): the labels that bags can have by their stage; see `possible_labels`.

    The stages are those of the bags' own table, or the store's where that has none.
    """
    known = {bag.bag_id: bag.extra.get("stage", "") for bag in store.bags}
    stages = {b.bag_id: b.extra.get("stage", known[b.bag_id]) for b in labelling.bags}
    return possible_labels(config.stages or {}, stages, labelling.labels, labelling.task)


def _views_too_large(config: TrainConfig, needed: int, memory: int) -> InputError:
    return InputError(
        f"--views {config.views}",
        expected=f"features in all views that fit in {memory / 1e9:.3g} GB of memory",
        got=f"{needed / 1e9:.3g} GB",
        remedy=f"train with --views off, or with --memory {-(-needed // 10**6)}MB if there is that",
    )


def stack_views(
    store: Store, tap: Tap, bags: RaggedBags, ids: Sequence[str], training: Sequence[int]
) -> RaggedBags:
    """Bags, followed by the training ones in every augmented view: ``LabelledBags.stacked``."""
    views = [view for view in store.description.views if view != CLEAN_VIEW]
    sizes = bags.offsets.diff()
    offsets = offsets_of(torch.cat((sizes, sizes[list(training)].repeat(len(views)))))
    values = bags.values.new_empty((int(offsets[-1]), *bags.in_shape))
    row = len(bags.values)
    values[:row] = bags.values
    for view in views:
        loaded, _ = store.load(tap.name, bags=[ids[k] for k in training], view=view)
        values[row : row + len(loaded)] = torch.from_numpy(loaded)
        row += len(loaded)
    return RaggedBags(values, offsets)


def choose_splits(labelling: Labelling, seed: int) -> list[str]:
    """The table's splits if every bag has one; a seeded, grouped, balanced one if none has."""
    splits = [bag.split for bag in labelling.bags]
    groups = [bag.group for bag in labelling.bags]
    if not any(splits):
        splits = make_split(labelling.ids, labelling.targets(), groups, seed=seed)
    elif not all(splits):
        first = labelling.bags[splits.index("")]
        raise InputError(
            f"{first.file}:{first.line}",
            expected="a split for every bag, or for none",
            got=f"none for bag {first.bag_id!r}",
            remedy="fill in the split column, or empty it to have a split made",
        )
    check_split(labelling.ids, splits, groups)
    return splits


# --- writing and reading a run -----------------------------------------------------------------


def _scores(
    targets: NDArray[np.int8],
    probabilities: NDArray[np.float64],
    rows: NDArray[np.int64],
    task: Task,
    decision: Decision,
    config: TrainConfig,
) -> dict[str, Any]:
    return evaluate(
        targets[rows],
        probabilities[rows],
        task=task,
        decision=decision,
        intervals=config.intervals,
        seed=config.seed,
    )


def tell_kept(decision: Decision, labels: Sequence[str], warn: Warn) -> None:
    """Report the labels for which no threshold could be chosen."""
    if decision.kept:
        names = ", ".join(labels[k] for k in decision.kept)
        warn(f"no validation bag has these labels, their thresholds stay 0.5: {names}")


def write_predictions(
    path: Path,
    labelling: Labelling,
    splits: Sequence[str],
    probabilities: NDArray[np.float64],
    decision: Decision,
) -> None:
    """Write bag_id, split, y_<label>…, p_<label>…, d_<label>…; y is empty without labels."""
    columns = [f"{kind}_{label}" for kind in "ypd" for label in labelling.labels]
    head = ["bag_id", "split", *columns]
    targets = labelling.targets().tolist()
    decided = decide(probabilities, labelling.task, decision).tolist()
    blank = [""] * len(labelling.labels)
    write_csv(
        path,
        head,
        (
            [bag.bag_id, split, *(blank if bag.labels is None else y), *map(repr, p), *d]
            for bag, split, y, p, d in zip(
                labelling.bags, splits, targets, probabilities.tolist(), decided, strict=True
            )
        ),
    )


def write_csv(path: Path, head: Sequence[str], rows: Any) -> None:
    """Write a table atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _write_course(out: Path, trained: Fitted, labels: Sequence[str]) -> None:
    """Write how training went: losses by epoch, or what was chosen for each label."""
    if isinstance(trained, ClassicalFitted):
        head = ["label", *(field.name for field in fields(Choice))]
        rows = ([k, *astuple(choice)] for k, choice in zip(labels, trained.choices, strict=True))
        write_csv(out / "selection.csv", head, rows)
        return
    write_csv(out / "history.csv", list(trained.history[0]), (r.values() for r in trained.history))


def _config_toml(config: TrainConfig, labelling: Labelling, store: Store) -> str:
    read = settings_read(config)
    settings = {k: v for k, v in read.items() if v is not None}
    for name in ("options", "loss_options", "schedule_options"):
        if name in read:
            settings[name] = {k: v for k, v in (read[name] or {}).items() if v is not None}
    record = {
        "train": settings,
        "data": {
            "name": store.name,
            "task": labelling.task,
            "labels": list(labelling.labels),
            "features": store.description.digest("features"),
            "numerics": store.description.digest("numerics"),
        },
    }
    return tomli_w.dumps(record)


def _write_checkpoint(
    path: Path,
    trained: Fitted,
    config: TrainConfig,
    labelling: Labelling,
    store: Store,
    decision: Decision,
    splits: Sequence[str],
) -> None:
    tap = store.tap(config.tap)
    digests = dict(zip(labelling.ids, hex_digests(store, labelling.ids), strict=True))
    tested = {b for b, split in zip(labelling.ids, splits, strict=True) if split == "test"}
    record = {
        "version": CHECKPOINT_VERSION,
        "config": asdict(config),
        "in_shape": list(tap.shape),
        "tap": tap.name,
        "labels": list(labelling.labels),
        "task": labelling.task,
        "best_epoch": trained.best_epoch,
        "decision": asdict(decision),
        "seen": {b: digest for b, digest in digests.items() if b not in tested},
        "tested": {b: digest for b, digest in digests.items() if b in tested},
        "provenance": {k: store.description.provenance[k] for k in ("features", "numerics")},
        "state": trained.model.state_dict(),
    }
    content = io.BytesIO()
    torch.save(record, content)
    write_bytes(path, content.getvalue())


def tell_twins(
    store: Store, labelling: Labelling, warn: Warn, splits: Sequence[str] | None = None
) -> None:
    """Report bags with the same features that need not stay on one side of a split.

    Args:
        splits: their sides, where they are known.
    """
    sides = splits or ["any"] * len(labelling.bags)
    first: dict[str, tuple[Bag, str]] = {}
    found = []
    for bag, side, digest in zip(
        labelling.bags, sides, hex_digests(store, labelling.ids), strict=True
    ):
        other, its_side = first.setdefault(digest, (bag, side))
        together = side == its_side if splits else bool(bag.group) and bag.group == other.group
        if other is not bag and not together:
            found.append(f"{other.bag_id!r} and {bag.bag_id!r}")
    if found:
        where = "are on two sides of the split" if splits else "may be on two sides of a fold"
        warn(
            f"{len(found)} pairs of bags with the same features {where}, first {found[0]}: "
            "give such bags one group"
        )


def hex_digests(store: Store, ids: Sequence[str]) -> list[str]:
    """The digests of bags by their ids, as a checkpoint keeps them."""
    return [digest.tobytes().hex() for digest in store.digests(ids)]


def load_checkpoint(run: Path) -> tuple[Model, dict[str, Any]]:
    """The model of a run, in evaluation mode, and everything its checkpoint records."""
    path = run / "checkpoint.pt"
    if not path.is_file():
        raise InputError(
            str(run),
            expected="a run folder with checkpoint.pt",
            got="none" if run.is_dir() else "no such folder",
            remedy="give the --out of a train-agg",
        )
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"other bytes than were written in {damaged}")
        record = torch.load(path, map_location="cpu", weights_only=True)
        if record["version"] != CHECKPOINT_VERSION:
            raise InputError(
                str(path),
                expected=f"checkpoint version {CHECKPOINT_VERSION}",
                got=str(record["version"]),
                remedy="use the version of dragn-cache that wrote it, or train again",
            )
        config = TrainConfig(**record["config"])
        shape, labels = tuple(record["in_shape"]), len(record["labels"])
        record["tap"], record["provenance"]["features"], record["provenance"]["numerics"]
        model = load_model(config, shape, labels, record["task"], record["state"])
    except CHECKPOINT_DAMAGE as error:
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            str(path), expected="a checkpoint of dragn-cache", got=got, remedy="train again"
        ) from error
    return model, record


def run_table(run: Path, name: str, columns: Sequence[str]) -> list[Row]:
    """The rows of one of a run's tables, which has these columns and a row at least."""
    path = run / name
    rows = read_table(path) if path.is_file() else []
    missing = [column for column in columns if not rows or column not in rows[0].cells]
    if missing:
        raise InputError(
            str(path),
            expected=f"the run's table with {missing[0]}",
            got="none" if path.is_file() else "no such file",
            remedy="give the --out of a train-agg, with all its files",
        )
    return rows


def decision_of(record: dict[str, Any]) -> Decision:
    """How a run decides, by its checkpoint; those of before there was a choice have the default."""
    return Decision(**record.get("decision", {}))


def refuse_other_features(run: Path, record: dict[str, Any], store: Store, warn: Warn) -> None:
    """Raise unless a store's features mean what a checkpoint's did; report other numerics."""
    wrong = differences(record["provenance"], store.description.provenance, ("features",))
    if wrong:
        raise StoreMismatchError(
            str(store.path),
            expected=f"the features that {run.name} was trained on",
            got=" · ".join(wrong),
            remedy="extract these images with the settings of the run's store",
        )
    other = differences(record["provenance"], store.description.provenance, ("numerics",))
    if other:
        warn(f"the features were computed slightly differently: {' · '.join(other)}")
