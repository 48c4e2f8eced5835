"""Runs: labels joined with features, trained, and written to a folder that explains itself.

RUN/
  config.toml      every setting, resolved
  splits.csv       bag_id, split, group, digest of the features
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
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray

from dragn_cache.classical import Choice
from dragn_cache.config import TrainConfig
from dragn_cache.decisions import Decision, check_rule_for, choose_decision, decide
from dragn_cache.devices import find_device
from dragn_cache.errors import InputError, StoreMismatchError
from dragn_cache.feeding import StoredBags, memory_for_features
from dragn_cache.files import is_unfinished, write_bytes, write_text
from dragn_cache.labelling import (
    Labelling,
    Warn,
    choose_tap,
    hex_digests,
    load_bags,
    load_labelled,
    possible_in,
    read_labelling,
    require_labels,
    tell_twins,
    tell_vectors,
)
from dragn_cache.manifest import SPLITS, Task
from dragn_cache.methods import (
    ClassicalFitted,
    Fitted,
    Model,
    fit_method,
    load_model,
    predict_method,
    settings_read,
    without_unread,
)
from dragn_cache.metrics import evaluate
from dragn_cache.store import Store, differences
from dragn_cache.tables import Row, read_table
from dragn_cache.train import Progress, no_views

CHECKPOINT_VERSION = 1
CHECKPOINT_DIGESTS = ("features", "numerics")  # of a store's provenance
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
    labelling, data = load_labelled(store, tap, labelling, config, warn)
    splits = data.splits
    digests = hex_digests(store, labelling.ids)
    tell_twins(labelling, digests, warn, splits)
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
        ["bag_id", "split", "group", "digest"],
        zip(labelling.ids, splits, groups, digests, strict=True),
    )
    _write_course(out, trained, labelling.labels)
    write_predictions(out / "predictions.csv", labelling, splits, p, decision)
    of_bags = zip(labelling.ids, digests, splits, strict=True)
    seen = {bag_id: digest for bag_id, digest, split in of_bags if split != "test"}
    _write_checkpoint(out / "checkpoint.pt", trained, config, labelling, store, decision, seen)
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
    seen: dict[str, str],
) -> None:
    tap = store.tap(config.tap)
    record = {
        "version": CHECKPOINT_VERSION,
        "config": asdict(config),
        "in_shape": list(tap.shape),
        "tap": tap.name,
        "labels": list(labelling.labels),
        "task": labelling.task,
        "best_epoch": trained.best_epoch,
        "decision": asdict(decision),
        "seen": seen,
        "provenance": {k: store.description.provenance[k] for k in CHECKPOINT_DIGESTS},
        "state": trained.model.state_dict(),
    }
    content = io.BytesIO()
    torch.save(record, content)
    write_bytes(path, content.getvalue())


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
        _ = (record["tap"], *(record["provenance"][kind] for kind in CHECKPOINT_DIGESTS))
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
