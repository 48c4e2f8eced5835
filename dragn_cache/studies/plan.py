"""Plan of a cross-validation: bags, folds, features and settings, checked before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.devices import find_device, free_bytes, memory_for_features
from dragn_cache.loading.labelling import (
    Labelling,
    hex_digests,
    read_labelling,
    require_labels,
    warn_misleading,
)
from dragn_cache.loading.splits import make_folds, require_split
from dragn_cache.loading.stored import StoredBags, usable_bags
from dragn_cache.machine import usable_cores
from dragn_cache.parallel.local import SharedArray
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.scoring.one_class import warn_one_class_tests
from dragn_cache.scoring.rules import require_rule_for
from dragn_cache.store import Store, json_digest
from dragn_cache.store.schema import KINDS
from dragn_cache.studies.config import CrossvalConfig
from dragn_cache.studies.folder import begin, read_config
from dragn_cache.studies.tables import Place, Truth
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags, choose_tap, possible_in, warn_vectors
from dragn_cache.training.fit import require_method, settings_read, without_unread
from dragn_cache.training.objective import positive_weights
from dragn_cache.types import Warn

# --- the plan ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyPlan:
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

    def tasks(self) -> list[Place]:
        """Every training, fold by fold, so that all methods have results early."""
        seeds, folds = range(len(self.truth.folds)), range(self.truth.count)
        return [(label, s, f) for s in seeds for f in folds for label in self.methods]

    def data(self, task: Place) -> LabelledBags:
        """The bags, targets and splits of one training."""
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


def plan_study(
    store: Store, config: CrossvalConfig, bags_csv: Path | None, out: Path, warn: Warn
) -> StudyPlan:
    """Check everything before the first training, and begin or take up the folder."""
    store.require_complete()
    labelling = read_labelling(store, bags_csv)
    require_labels(labelling)
    require_rule_for(config.train.decision, labelling.task, len(labelling.labels))
    labelling, sizes = usable_bags(store, labelling, warn)
    if any(bag.split for bag in labelling.bags):
        warn("the table's splits are not used: cross-validation makes its own")
    methods = {label: without_unread(m, warn) for label, m in config.methods.items()}
    taps = {label: choose_tap(store, method) for label, method in methods.items()}
    methods = {label: m.replace(tap=taps[label].name) for label, m in methods.items()}
    for label, method in methods.items():
        warn_vectors(taps[label], method, warn)
    digests = hex_digests(store, labelling.ids)
    warn_misleading(store, labelling, warn)
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
    plan = StudyPlan(methods, features, labelling, sizes, truth, needed > budget, possible)
    _require_methods(plan, config, min(needed, budget), warn)
    tests = [
        truth.targets[truth.folds[seed] == fold]
        for seed in range(config.seeds)
        for fold in range(config.folds)
    ]
    warn_one_class_tests(tests, labelling.labels, warn)
    if plan.streamed:
        warn(
            f"the features of {', '.join(used)} ({needed / 1e9:.3g} GB) are more than the "
            f"{budget / 1e9:.3g} GB of memory for them: they are streamed from the store, "
            "one training at a time"
        )
    begin(out, before, _record(plan, config, store, digests, budget), plan.tasks(), truth)
    return plan


def _budget(config: TrainConfig, before: dict[str, Any], needed: int) -> int:
    """Bytes that features may fill; a study that goes on keeps to the memory it began with."""
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
            require_split(labelling.ids, truth.splits(seed, fold).tolist(), groups)
    return truth


def _require_methods(plan: StudyPlan, config: CrossvalConfig, reserved: int, warn: Warn) -> None:
    """Raise the error that every training of a method would raise.

    Args:
        reserved: bytes that features will take, which are not loaded yet.
    """
    jobs = max(1, min(count_jobs(config, plan), len(plan.tasks())))
    for label, method in plan.methods.items():
        data = plan.data((label, 0, 0))
        free = max(0, free_bytes(find_device(method.device)) - reserved)
        require_method(
            method,
            data.bags.in_shape,
            data.targets.shape[1],
            sizes=data.bags.offsets.diff(),
            free=free,
            jobs=jobs,
            warn=warn,
        )
        positive_weights(data, method, find_device(method.device))


def _offsets(sizes: NDArray[np.int64]) -> torch.Tensor:
    return offsets_of(torch.from_numpy(sizes))


# --- training ----------------------------------------------------------------------------------


def count_jobs(config: CrossvalConfig, plan: StudyPlan) -> int:
    """Trainings at once: as many as the settings ask for, else one for each core, one on a GPU."""
    if plan.streamed:
        return 1
    if config.jobs is not None:
        return config.jobs
    return usable_cores() if find_device(config.train.device).type == "cpu" else 1


# --- settings and tables -----------------------------------------------------------------------

# Not among a method's settings: each training has its own seed, and the rest concerns all.
NOT_COMPARED = ("seed", "intervals", "decision", "memory")


def _record(
    plan: StudyPlan, config: CrossvalConfig, store: Store, digests: Sequence[str], budget: int
) -> dict[str, Any]:
    """config.toml: what the results depend on; ``digests`` are those of the bags' features."""
    description, labelling = store.description, plan.labelling
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
            "instances": int(plan.sizes.sum()),
            "revision": description.revision,
            **{kind: description.digest(kind) for kind in KINDS},
        },
        "methods": {label: _settings(method) for label, method in plan.methods.items()},
    }
    if plan.possible is not None:
        record["data"]["possible"] = json_digest(plan.possible.tolist())
    if plan.streamed:  # the order of training depends on the blocks
        record["crossval"]["memory"] = f"{budget}B"
    return record


def _settings(config: TrainConfig) -> dict[str, Any]:
    """The settings of a method that its trainings depend on."""
    # A loss or a schedule without options has no table, as in studies of before there was a choice.
    return {
        name: value
        for name, value in settings_read(config).items()
        if name not in NOT_COMPARED and (value != {} or name == "options")
    }
