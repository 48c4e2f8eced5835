"""A run applied to the bags of a store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.checksums import write_checksums
from dragn_cache.devices import find_device, memory_for_features
from dragn_cache.errors import likely
from dragn_cache.files import write_text
from dragn_cache.loading.labelling import Labelling, hex_digests, read_labelling, warn_seen
from dragn_cache.loading.stored import load_bags
from dragn_cache.manifest.doubts import warn_doubts
from dragn_cache.runs.checkpoint import Checkpoint, load_checkpoint, require_same_features
from dragn_cache.runs.config import ApplyConfig
from dragn_cache.runs.folder import score_split, write_predictions
from dragn_cache.scoring.one_class import warn_one_class
from dragn_cache.store import Store
from dragn_cache.store.new_path import new_path
from dragn_cache.training.data import possible_in
from dragn_cache.training.fit import Model, predict_method
from dragn_cache.types import Warn

DEFAULTS = ApplyConfig()


def predict_run(
    run: Path,
    store: Store,
    out: Path,
    config: ApplyConfig = DEFAULTS,
    *,
    bags_csv: Path | None = None,
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
    target = find_device(config.device)
    model, checkpoint = load_checkpoint(run, config.allow_class)
    require_same_features(run, checkpoint, store, warn)
    store.require_complete()
    labelling = _labelling_for(checkpoint, store, bags_csv, warn)
    with new_path(out) as folder:
        labelling, p = apply_model(model, checkpoint, store, labelling, target, warn)
        warn_doubts(labelling.bags, None, warn)
        warn_seen(store, labelling, checkpoint.seen or {}, warn)
        folder.mkdir()
        splits = [bag.split for bag in labelling.bags]
        write_predictions(folder / "predictions.csv", labelling, splits, p, checkpoint.decision)
        scores = None
        if all(bag.labels is not None for bag in labelling.bags):
            scores = _score(run, checkpoint, store, labelling, p, warn)
            write_text(folder / "metrics.json", json.dumps({"all": scores}, indent=2) + "\n")
        write_checksums(folder)
    return scores


def _score(
    run: Path,
    checkpoint: Checkpoint,
    store: Store,
    labelling: Labelling,
    probabilities: NDArray[np.float64],
    warn: Warn,
) -> dict[str, Any]:
    """Scores over all bags, with a warning where the run has seen some of them."""
    known = set((checkpoint.seen or {}).values())
    trained = sum(digest in known for digest in hex_digests(store, labelling.ids))
    if trained:
        warn(
            f"{trained} of these {len(labelling.bags)} bags were in the run's training or "
            f"validation: score new ones, or dragn-cache evaluate {run}"
        )
    warn_one_class(labelling.targets(), labelling.labels, "labelled bags", warn)
    rows = np.arange(len(labelling.bags))
    return score_split(
        labelling.targets(),
        probabilities,
        rows,
        labelling.task,
        checkpoint.decision,
        checkpoint.config,
    )


def apply_model(
    model: Model,
    checkpoint: Checkpoint,
    store: Store,
    labelling: Labelling,
    device: torch.device,
    warn: Warn,
) -> tuple[Labelling, NDArray[np.float64]]:
    """Probabilities (B, L) of a store's bags; those without a usable instance are left out.

    Labels that a bag's stage cannot have are 0 if the run masks predictions.
    """
    memory = memory_for_features("auto", device)
    labelling, bags = load_bags(store, store.tap(checkpoint.tap), labelling, memory, warn)
    probabilities = predict_method(model, bags, labelling.task, device)
    config = checkpoint.config
    if config.masks_predictions:
        probabilities = np.where(possible_in(store, labelling, config), probabilities, 0.0)
    return labelling, probabilities


def _labelling_for(
    checkpoint: Checkpoint, store: Store, bags_csv: Path | None, warn: Warn
) -> Labelling:
    """The bags to predict, with the run's labels; without any, where they carry other labels."""
    if bags_csv is None:
        used = {label for bag in store.bags for label in bag.labels or ()}
        unknown = sorted(used - set(checkpoint.labels))
        if unknown:
            meant = likely(unknown[0], checkpoint.labels)
            hint = f", perhaps {meant}" if meant else ""
            warn(
                f"the run does not know the store's label {unknown[0]!r}{hint}: predictions "
                "without scores"
            )
            bags = tuple(replace(bag, labels=None) for bag in store.bags)
            return Labelling(bags, checkpoint.labels, checkpoint.task)
    return read_labelling(store, bags_csv, labels=checkpoint.labels, task=checkpoint.task)
