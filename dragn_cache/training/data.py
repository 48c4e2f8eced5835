"""Labelled bags for a training: loaded, standardised, with their views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.devices import find_device, memory_for_features
from dragn_cache.errors import InputError, SettingError
from dragn_cache.loading.feeds import Feed, Presentations, Streamed, in_order
from dragn_cache.loading.label_masks import possible_labels
from dragn_cache.loading.labelling import Labelling, choose_splits
from dragn_cache.loading.stored import StoredBags, load_bags
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.ragged.scaling import Standardise
from dragn_cache.store import Store, Tap
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.methods import method_facts
from dragn_cache.training.model import BagClassifier
from dragn_cache.types import CLEAN_VIEW, Task, Warn


def choose_tap(store: Store, config: TrainConfig) -> Tap:
    """The tap asked for, else a map for methods that need maps and a vector for the rest."""
    if config.tap is not None:
        return store.tap(config.tap)
    wants_map = method_facts(config.aggregator).needs == "map"
    for tap in store.description.taps:
        if (len(tap.shape) == 3) == wants_map:
            return tap
    return store.tap()


def warn_vectors(tap: Tap, config: TrainConfig, warn: Warn) -> None:
    """Report a method meant for maps that is given vectors."""
    if method_facts(config.aggregator).needs == "map" and len(tap.shape) == 1:
        warn(
            f"{config.aggregator} is meant for maps: the vectors of {tap.name} are maps of a pixel"
        )


def load_labelled(
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
    return SettingError(
        "views",
        expected=f"features in all views that fit in {memory / 1e9:.3g} GB of memory",
        got=f"{needed / 1e9:.3g} GB for {config.views}",
        remedy=f"train with `views=off`, or with `memory={-(-needed // 10**6)}MB` if there is that",
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


@dataclass(frozen=True)
class LabelledBags:
    """Features with what is to be learned: bags, targets (B, L) of 0 and 1, split of each bag.

    Attributes:
        bags: the B bags' clean features, in memory or to be read from their store.
        stacked: for training on views: ``bags`` (in the same memory), and after them the training
            bags in the first augmented view, in the second, and so on, K views in all.
        groups: the group of each bag, empty for a group of its own; () if all are.
        possible: (B, L), the labels that a bag can have, for ``config.stage_mask``.
    """

    bags: RaggedBags | StoredBags
    targets: NDArray[np.int8]
    splits: tuple[str, ...]
    task: Task
    stacked: RaggedBags | None = None
    groups: tuple[str, ...] = ()
    possible: NDArray[np.bool_] | None = None

    def rows(self, split: str) -> NDArray[np.int64]:
        """Numbers of the bags of a split."""
        return np.flatnonzero(np.array(self.splits) == split)


def fit_scaling(
    scaling: Standardise | None, bags: RaggedBags | StoredBags, data: LabelledBags
) -> None:
    """Fit the scaling, if there is one, on the training bags."""
    if scaling is None:
        return
    training = torch.from_numpy(data.rows("train"))
    if isinstance(bags, RaggedBags):
        scaling.fit(bags.select(training))
    else:
        scaling.fit_batches(in_order(bags, training))


def fit_aggregator(model: BagClassifier, bags: RaggedBags | StoredBags, data: LabelledBags) -> None:
    """Give the aggregator what it takes from the training bags before training, scaled."""
    batches = in_order(bags, torch.from_numpy(data.rows("train")))
    scaling = model.scaling
    model.aggregator.fit(batches if scaling is None else map(scaling, batches))


def present(
    data: LabelledBags, config: TrainConfig, device: torch.device, *, shuffle: bool
) -> tuple[Feed, RaggedBags | StoredBags]:
    """Which bags an epoch of training shows, and in which views; and the clean bags.

    Args:
        device: where batches, and bags in memory, go.
        shuffle: whether the instances of each bag come in a random order.

    Raises:
        InputError: views are asked for and there are none.
    """
    training = torch.from_numpy(data.rows("train"))
    if config.views != "off" and data.stacked is None:
        raise no_views(config, "features")
    if isinstance(data.bags, StoredBags):
        stored = data.bags.to(device=device)
        return Streamed(stored, training, shuffle), stored
    if config.views == "off" or data.stacked is None:
        bags = data.bags.to(device=device)
        return Presentations(bags, training[None], training, shuffle), bags
    stacked = data.stacked.to(device=device)
    augmented = torch.arange(len(data.bags), len(stacked)).view(-1, len(training))
    numbers, rows = torch.cat((training[None], augmented)), training  # (1 + K, T)
    if config.views == "all":
        numbers, rows = numbers.view(1, -1), training.repeat(len(numbers))
    return Presentations(stacked, numbers, rows, shuffle), stacked.first(len(data.bags))


def no_views(config: TrainConfig, where: str) -> InputError:
    """The error for features without augmented views where some are asked for."""
    return InputError(
        where,
        expected=f"augmented views for `views={config.views}`",
        got="the clean view only",
        remedy="extract with augmented views, or train with `views=off`",
    )
