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

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dragn_cache.files import write_csv, write_text
from dragn_cache.loading.labelling import (
    Labelling,
    hex_digests,
    read_labelling,
    require_labels,
    warn_same_features,
)
from dragn_cache.loading.stored import StoredBags
from dragn_cache.runs.checkpoint import Checkpoint, write_checkpoint
from dragn_cache.runs.folder import config_toml, score_split, write_history, write_predictions
from dragn_cache.scoring.decisions import Decision, choose_decision, warn_kept_thresholds
from dragn_cache.scoring.rules import require_rule_for
from dragn_cache.store import Store
from dragn_cache.store.new_path import new_path
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import choose_tap, load_labelled, no_views, warn_vectors
from dragn_cache.training.fit import Fitted, fit_method, without_unread
from dragn_cache.training.train import Progress
from dragn_cache.types import SPLITS, Warn


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
    with new_path(out) as folder:
        return _train(store, config, folder, bags_csv, progress, warn)


def _train(
    store: Store,
    config: TrainConfig,
    out: Path,
    bags_csv: Path | None,
    progress: Progress | None,
    warn: Warn,
) -> dict[str, Any]:
    """Train, and write the run to a folder that does not exist yet."""
    store.require_complete()
    config = without_unread(config, warn)
    if config.views != "off" and len(store.description.views) == 1:
        raise no_views(config, str(store.path))
    tap = choose_tap(store, config)
    warn_vectors(tap, config, warn)
    labelling = read_labelling(store, bags_csv)
    require_labels(labelling)
    require_rule_for(config.decision, labelling.task, len(labelling.labels))
    labelling, data = load_labelled(store, tap, labelling, config, warn)
    splits = data.splits
    digests = hex_digests(store, labelling.ids)
    warn_same_features(labelling, digests, warn, splits)
    trained = fit_method(data, config, labels=labelling.labels, progress=progress, warn=warn)
    p, chosen = trained.probabilities, data.rows("validation")
    decision = choose_decision(config.decision, data.task, data.targets[chosen], p[chosen])
    warn_kept_thresholds(decision, labelling.labels, warn)
    metrics = {
        split: score_split(data.targets, p, data.rows(split), data.task, decision, config)
        for split in SPLITS
    }
    config = config.replace(tap=tap.name)
    if isinstance(data.bags, StoredBags):  # the order of training depends on the blocks
        config = config.replace(memory=f"{data.bags.budget}B")
    _write_run(out, store, _Outcome(config, labelling, splits, digests, trained, decision), metrics)
    return metrics


@dataclass(frozen=True)
class _Outcome:
    """A training's result and what a run's folder says of it.

    Attributes:
        config: the settings, tap and memory resolved.
        labelling: the B bags.
        splits: their sides.
        digests: of their features.
        trained: the model and its history.
        decision: chosen on the validation bags.
    """

    config: TrainConfig
    labelling: Labelling
    splits: Sequence[str]
    digests: Sequence[str]
    trained: Fitted
    decision: Decision


def _write_run(out: Path, store: Store, run: _Outcome, metrics: Mapping[str, Any]) -> None:
    """Write a run's folder, the checkpoint first, metrics.json last."""
    config, labelling, splits, trained = run.config, run.labelling, run.splits, run.trained
    out.mkdir()
    of_bags = zip(labelling.ids, run.digests, splits, strict=True)
    seen = {bag_id: digest for bag_id, digest, split in of_bags if split != "test"}
    checkpoint = Checkpoint.of(trained, config, labelling, store, run.decision, seen)
    write_checkpoint(out / "checkpoint.pt", checkpoint)
    write_text(out / "config.toml", config_toml(config, labelling, store))
    groups = [bag.group for bag in labelling.bags]
    write_csv(
        out / "splits.csv",
        ["bag_id", "split", "group", "digest"],
        zip(labelling.ids, splits, groups, run.digests, strict=True),
    )
    write_history(out, trained, labelling.labels)
    p = trained.probabilities
    write_predictions(out / "predictions.csv", labelling, splits, p, run.decision)
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
