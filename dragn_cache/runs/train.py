"""Runs: labels joined with features, trained, and written to a folder that explains itself.

RUN/
  config.toml      every setting, resolved
  splits.csv       bag_id, split, group, digest of the features
  history.csv      loss by epoch; without epochs selection.csv, how each label's SVM was chosen
  metrics.json     every score for train, validation and test, with 95 % intervals
  predictions.csv  bag_id, split, y_<label>…, p_<label>…, d_<label>… (truth, probability, decision)
  checkpoint.pt    weights or machines, how to decide, the digests of the features and bags used
  SHA256SUMS       the digests of these files, which every command that reads them compares

The checkpoint and the history are written first. If the rest cannot be, they stay beside the folder
that is to be made, and the same call takes them up instead of training again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.checksums import changed_files, write_checksums
from dragn_cache.devices import find_device
from dragn_cache.errors import InputError
from dragn_cache.files import (
    read_text,
    write_csv,
    write_text,
)
from dragn_cache.loading.labelling import (
    Labelling,
    hex_digests,
    read_labelling,
    require_labels,
    warn_misleading,
)
from dragn_cache.loading.stored import StoredBags
from dragn_cache.runs.checkpoint import (
    CHECKPOINT_DIGESTS,
    CHECKPOINT_VERSION,
    Checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from dragn_cache.runs.folder import config_toml, score_split, write_history, write_predictions
from dragn_cache.scoring.decisions import Decision, choose_decision, warn_kept_thresholds
from dragn_cache.scoring.one_class import warn_one_class
from dragn_cache.scoring.rules import require_rule_for
from dragn_cache.store import Store, json_digest
from dragn_cache.store.new_path import new_path
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import (
    LabelledBags,
    choose_tap,
    load_labelled,
    no_views,
    warn_vectors,
)
from dragn_cache.training.fit import fit_method, predict_method, settings_read, without_unread
from dragn_cache.training.objective import masked
from dragn_cache.training.train import Progress
from dragn_cache.types import SPLITS, Warn

TRAINED = "trained"
"""A file beside an unfinished run whose model is written: the digest of what it was trained on."""

Result = tuple[NDArray[np.float64], Decision]
"""Probabilities (B, L) of all bags, and how they are decided."""


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
    with new_path(out, keep=TRAINED) as folder:
        return _train(store, config, folder, bags_csv, progress, warn)


def _train(
    store: Store,
    config: TrainConfig,
    out: Path,
    bags_csv: Path | None,
    progress: Progress | None,
    warn: Warn,
) -> dict[str, Any]:
    """Train, or take up a training that could not be written whole, and write the run."""
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
    digests = hex_digests(store, labelling.ids)
    warn_misleading(store, labelling, warn, data.splits)
    warn_one_class(data.targets[data.rows("test")], labelling.labels, "test bags", warn)
    config = config.replace(tap=tap.name)
    if isinstance(data.bags, StoredBags):  # the order of training depends on the blocks
        config = config.replace(memory=f"{data.bags.budget}B")
    training = _Training(store, config, labelling, data, digests)
    found = training.read(out)
    if found is None:
        found = training.fit_and_write(out, progress, warn)
    else:
        warn("trained already: a run before this one was not written whole, and is finished now")
    p, decision = found
    warn_kept_thresholds(decision, labelling.labels, warn)
    metrics = {
        split: score_split(data.targets, p, data.rows(split), data.task, decision, config)
        for split in SPLITS
    }
    training.write_tables(out, p, decision, metrics)
    return metrics


@dataclass(frozen=True)
class _Training:
    """One training: everything that its result depends on.

    Attributes:
        config: the settings, tap and memory resolved.
        labelling: the B bags.
        data: their features and splits.
        digests: of their features.
    """

    store: Store
    config: TrainConfig
    labelling: Labelling
    data: LabelledBags
    digests: Sequence[str]

    def digest(self) -> str:
        """Hex sha256 of what the result depends on."""
        bags = zip(self.labelling.bags, self.data.splits, self.digests, strict=True)
        provenance = self.store.description.provenance
        return json_digest(
            {
                "versions": [CHECKPOINT_VERSION, torch.__version__],
                "settings": settings_read(self.config),
                "labels": [self.labelling.task, *self.labelling.labels],
                "bags": [
                    [bag.bag_id, *sorted(bag.labels or ()), split, bag.group, bag.extra, digest]
                    for bag, split, digest in bags
                ],
                **{kind: provenance[kind] for kind in CHECKPOINT_DIGESTS},
            }
        )

    def read(self, out: Path) -> Result | None:
        """The result of this very training that an unfinished run's folder holds, or None."""
        mark = out.with_name(TRAINED)
        try:
            if read_text(mark) != self.digest() or changed_files(out, ()):
                return None
            model, checkpoint = load_checkpoint(out, self.config.aggregator)
        except (OSError, InputError):  # none, or damaged: it is trained again
            return None
        device = find_device(self.config.device)
        p = predict_method(model, self.data.bags, self.data.task, device)
        return masked(p, self.data, self.config), checkpoint.decision

    def fit_and_write(self, out: Path, progress: Progress | None, warn: Warn) -> Result:
        """Train, and write what cannot be had again without training."""
        config, labelling, data = self.config, self.labelling, self.data
        out.with_name(TRAINED).unlink(missing_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        trained = fit_method(data, config, labels=labelling.labels, progress=progress, warn=warn)
        p, chosen = trained.probabilities, data.rows("validation")
        decision = choose_decision(config.decision, data.task, data.targets[chosen], p[chosen])
        out.mkdir()
        of_bags = zip(labelling.ids, self.digests, data.splits, strict=True)
        seen = {bag_id: digest for bag_id, digest, split in of_bags if split != "test"}
        checkpoint = Checkpoint.of(trained, config, labelling, self.store, decision, seen)
        write_checkpoint(out / "checkpoint.pt", checkpoint)
        write_history(out, trained, labelling.labels)
        write_checksums(out)
        write_text(out.with_name(TRAINED), self.digest())
        return p, decision

    def write_tables(
        self, out: Path, p: NDArray[np.float64], decision: Decision, metrics: Mapping[str, Any]
    ) -> None:
        """Write the rest of a run's folder, the digests last."""
        labelling, splits = self.labelling, self.data.splits
        write_text(out / "config.toml", config_toml(self.config, labelling, self.store))
        groups = [bag.group for bag in labelling.bags]
        write_csv(
            out / "splits.csv",
            ["bag_id", "split", "group", "digest"],
            zip(labelling.ids, splits, groups, self.digests, strict=True),
        )
        write_predictions(out / "predictions.csv", labelling, splits, p, decision)
        write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        write_checksums(out)
