"""Evaluation: a run's model scored on bags that it was not trained on, and written as a folder.

OUT/
  metrics.json      every score with 95 % intervals, under the name of what was scored
  predictions.csv   bag_id, split, y_<label>…, p_<label>…, d_<label>…
  labels.csv        each label's positives, scores and threshold
  calibration.png   reliability diagram
  SHA256SUMS        the digests of these files

- Without a store the run's own predictions are scored again, by default those of its test bags.
- With a store every bag must be new: no training or validation bag of the run, known by its
  id, its group or the digest of its features. A split scores the run's own bags of its own store.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dragn_cache.checksums import write_checksums
from dragn_cache.devices import find_device
from dragn_cache.errors import InputError, SettingError, StoreMismatchError
from dragn_cache.figures.reliability import plot_reliability
from dragn_cache.files import write_csv, write_text
from dragn_cache.loading.labelling import (
    Labelling,
    hex_digests,
    read_labelling,
    require_labels,
    warn_seen,
)
from dragn_cache.manifest import Bag
from dragn_cache.manifest.doubts import warn_doubts
from dragn_cache.manifest.tables import Row
from dragn_cache.runs.checkpoint import Checkpoint, load_checkpoint, require_same_features
from dragn_cache.runs.config import EvaluateConfig, Split
from dragn_cache.runs.folder import run_table, write_predictions
from dragn_cache.runs.predict import apply_model
from dragn_cache.scoring.calibration import reliability
from dragn_cache.scoring.decisions import (
    HALF,
    Decision,
    choose_decision,
    warn_kept_thresholds,
)
from dragn_cache.scoring.metrics import evaluate
from dragn_cache.scoring.one_class import warn_one_class
from dragn_cache.scoring.rules import require_rule_for
from dragn_cache.store import Store
from dragn_cache.store.new_path import new_path
from dragn_cache.texts import difference, twin
from dragn_cache.types import SPLITS, Warn

DEFAULTS = EvaluateConfig()
SPLIT_COLUMNS = ("bag_id", "split", "group")
LABEL_COLUMNS = ("positives", "auc", "average_precision", "f1", "precision", "recall")


@dataclass(frozen=True)
class Evaluation:
    """Scores of some bags.

    Attributes:
        name: which bags were scored: a split of the run, ``all`` of them, or ``new`` bags.
        labels: the labels' names.
        scores: as `evaluate` gives them.
    """

    name: str
    labels: tuple[str, ...]
    scores: dict[str, Any]


def evaluate_run(
    run: Path,
    out: Path,
    config: EvaluateConfig = DEFAULTS,
    *,
    store: Store | None = None,
    bags_csv: Path | None = None,
    warn: Warn = lambda text: None,
) -> Evaluation:
    """Score a run's model and write the scores to a folder.

    Args:
        run: a run folder.
        out: the folder to write.
        config: which bags, and how they are decided.
        store: labelled bags to predict; None scores the predictions that the run has written.
        bags_csv: only these bags of the store, with these labels.

    Raises:
        InputError: there is no usable run, ``out`` holds files, a bag is not labelled or the run
            was trained on it, or the rule does not fit.
        StoreMismatchError: the store's features are not those that the model was trained on, or,
            with ``split``, it is not the run's own store.
        StoreError: the store is incomplete or damaged.
    """
    target, split = find_device(config.device), config.split
    model, checkpoint = load_checkpoint(run, config.allow_class)
    decision = _decision(run, checkpoint, config.decision, warn)
    if store is None:
        _require_no_bags_table(bags_csv)
        labelling, p = _own_predictions(run, checkpoint, split or "test")
    else:
        require_same_features(run, checkpoint, store, warn)
        store.require_complete()
        labelling = _labelled_bags(run, checkpoint, store, bags_csv, split, warn)
    name = split or ("test" if store is None else "new")
    with new_path(out) as folder:
        if store is not None:
            labelling, p = apply_model(model, checkpoint, store, labelling, target, warn)
            warn_seen(store, labelling, checkpoint.seen or {}, warn)
        warn_doubts(labelling.bags, None, warn)
        who = "bags" if name == "all" else f"{name} bags"
        warn_one_class(labelling.targets(), labelling.labels, who, warn)
        scores = evaluate(
            labelling.targets(),
            p,
            task=labelling.task,
            decision=decision,
            intervals=checkpoint.config.intervals,
            seed=checkpoint.config.seed,
        )
        evaluation = Evaluation(name, checkpoint.labels, scores)
        _write(folder, evaluation, labelling, p, decision, f"{run.name} on {name} bags")
    return evaluation


def _decision(run: Path, checkpoint: Checkpoint, rule: str | None, warn: Warn) -> Decision:
    """The run's decision, or another by name."""
    own = checkpoint.decision
    if rule is None or rule == own.rule:
        return own
    require_rule_for(rule, checkpoint.task, len(checkpoint.labels))
    labelling, p = _own_predictions(run, checkpoint, "validation")
    decision = choose_decision(rule, labelling.task, labelling.targets(), p)
    warn_kept_thresholds(decision, labelling.labels, warn)
    return decision


def _require_no_bags_table(bags_csv: Path | None) -> None:
    if bags_csv is not None:
        raise SettingError(
            "bags_csv",
            expected="a `store` whose bags they are",
            got="none",
            remedy="add it, or leave `bags_csv` out to score the run's own predictions",
        )


# --- which bags --------------------------------------------------------------------------------


def _own_predictions(
    run: Path, checkpoint: Checkpoint, split: Split
) -> tuple[Labelling, NDArray[np.float64]]:
    """Labels and probabilities (B, L) of a split, from the run's predictions.csv."""
    labels = checkpoint.labels
    columns = [f"{kind}_{label}" for kind in "yp" for label in labels]
    rows = run_table(run, "predictions.csv", ["bag_id", "split", *columns])
    rows = [row for row in rows if split in ("all", row.cells["split"])]
    bags = []
    p = np.zeros((len(rows), len(labels)))
    for k, row in enumerate(rows):
        p[k] = [_number(run, row, f"p_{label}") for label in labels]
        positives = tuple(label for label in labels if _number(run, row, f"y_{label}") == 1)
        bags.append(
            Bag(row.cells["bag_id"], positives, row.cells["split"], "", {}, row.file, row.line)
        )
    return Labelling(tuple(bags), labels, checkpoint.task), p


def _number(run: Path, row: Row, column: str) -> float:
    """A number from 0 to 1 in a table of a run."""
    try:
        value = float(row.cells[column])
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(
            f"{run / row.file}:{row.line}",
            expected=f"a number from 0 to 1 in {column}",
            got=repr(row.cells[column]),
            remedy="restore the file, or train again",
        )
    return value


def _labelled_bags(
    run: Path,
    checkpoint: Checkpoint,
    store: Store,
    bags_csv: Path | None,
    split: Split | None,
    warn: Warn,
) -> Labelling:
    """The bags of a store to score: new ones, or those of a split of the run."""
    labelling = read_labelling(store, bags_csv, labels=checkpoint.labels, task=checkpoint.task)
    split_rows = {
        row.cells["bag_id"]: row.cells for row in run_table(run, "splits.csv", SPLIT_COLUMNS)
    }
    trained = {bag_id: row for bag_id, row in split_rows.items() if row["split"] != "test"}
    if checkpoint.seen is None:
        warn(f"{run.name} is of before digests of bags were kept: they are known by id and group")
    digests = checkpoint.seen or {}
    if split is None:
        _require_unseen(run, store, labelling, trained, digests)
    else:
        written = {bag_id: row["digest"] for bag_id, row in split_rows.items() if "digest" in row}
        digests = {**digests, **written}
        _require_own(run, store, split_rows, digests, split)
        sides = SPLITS if split == "all" else (split,)
        bags = [bag for bag in labelling.bags if bag.bag_id in split_rows]
        bags = [replace(bag, split=split_rows[bag.bag_id]["split"]) for bag in bags]
        labelling = replace(labelling, bags=tuple(bag for bag in bags if bag.split in sides))
    if not labelling.bags:
        raise InputError(
            str(bags_csv or store.path),
            expected=f"bags of the {split} split of {run.name}" if split else "bags",
            got="none",
            remedy="give other `bags_csv`",
        )
    require_labels(labelling)
    return labelling


def _require_unseen(
    run: Path,
    store: Store,
    labelling: Labelling,
    trained: Mapping[str, Mapping[str, str]],
    digests: Mapping[str, str],
) -> None:
    """Raise `InputError` if the run was trained on a bag of the same id, group or digest."""
    of_group = {row["group"]: bag_id for bag_id, row in trained.items() if row["group"]}
    of_digest = {digest: bag_id for bag_id, digest in digests.items()}
    # Its own store knows a bag's group even where the table of bags leaves it out.
    own_group = {bag.bag_id: bag.group for bag in store.bags}
    matches = []
    for bag, digest in zip(labelling.bags, hex_digests(store, labelling.ids), strict=True):
        group = bag.group if bag.group in of_group else own_group[bag.bag_id]
        if bag.bag_id in trained:
            matches.append(f"{bag.bag_id!r}, of its {trained[bag.bag_id]['split']} bags")
        elif group in of_group:
            other = of_group[group]
            matches.append(f"{bag.bag_id!r}, of the same group {group!r} as its bag {other!r}")
        elif digest in of_digest:
            matches.append(f"{bag.bag_id!r}, with the features of its bag {of_digest[digest]!r}")
    if matches:
        raise InputError(
            str(store.path),
            expected=f"bags that {run.name} was not trained on",
            got=f"{len(matches)} of {len(labelling.bags)} that it was: {matches[0]}",
            remedy="name the others with `bags_csv`, or, if this is the run's own store, "
            "score its test bags with `split=test`",
        )


def _require_own(
    run: Path,
    store: Store,
    split_rows: Mapping[str, object],
    digests: Mapping[str, str],
    split: Split,
) -> None:
    """Raise unless a store holds all bags of a run, with the same features."""
    known = set(store.bag_ids)
    missing = [bag_id for bag_id in split_rows if bag_id not in known]
    got = ""
    if missing:
        alike = twin(missing[0], sorted(known))
        but = f" but {alike!r}, differing by {difference(missing[0], alike)}" if alike else ""
        got = f"none named {missing[0]!r}{but}"
    if not missing:
        ids = list(digests)
        stored = zip(ids, hex_digests(store, ids), strict=True)
        changed = [bag_id for bag_id, digest in stored if digest != digests[bag_id]]
        got = f"other features for {changed[0]!r}" if changed else ""
    if got:
        raise StoreMismatchError(
            str(store.path),
            expected=f"for `split={split}` the bags of {run.name}",
            got=got,
            remedy="give the run's own store, or leave `split` out to score new bags",
        )


# --- writing -----------------------------------------------------------------------------------


def _write(
    out: Path,
    evaluation: Evaluation,
    labelling: Labelling,
    p: NDArray[np.float64],
    decision: Decision,
    title: str,
) -> None:
    out.mkdir()
    splits = [bag.split for bag in labelling.bags]
    write_predictions(out / "predictions.csv", labelling, splits, p, decision)
    write_csv(out / "labels.csv", ["label", *LABEL_COLUMNS, "threshold"], label_rows(evaluation))
    bins = reliability(labelling.targets(), p, labelling.task)
    plot_reliability(
        out / "calibration.png", bins, f"{title}: {len(p)} bags, {len(evaluation.labels)} labels"
    )
    write_text(
        out / "metrics.json", json.dumps({evaluation.name: evaluation.scores}, indent=2) + "\n"
    )
    write_checksums(out)


def label_rows(evaluation: Evaluation) -> list[list[Any]]:
    """A row for each label: its name, `LABEL_COLUMNS`, its threshold; None where undefined.

    Only the rules ``half`` and ``thresholds`` have a threshold that is the same for every bag.
    """
    fixed = [HALF if evaluation.scores["decision"] == "half" else None] * len(evaluation.labels)
    thresholds = evaluation.scores["thresholds"] or fixed
    columns = [evaluation.scores[name] for name in LABEL_COLUMNS]
    return [list(row) for row in zip(evaluation.labels, *columns, thresholds, strict=True)]
