"""Labels joined with features: which bags are learned from, and on which side of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.bags import RaggedBags, offsets_of
from dragn_cache.config import TrainConfig
from dragn_cache.devices import find_device
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.feeding import StoredBags, memory_for_features
from dragn_cache.manifest import Bag, Task, check_bags, columns_given, read_bags
from dragn_cache.methods import method_facts
from dragn_cache.splits import check_split, make_split
from dragn_cache.stages import possible_labels
from dragn_cache.store import Store, Tap
from dragn_cache.store.schema import CLEAN_VIEW
from dragn_cache.train import LabelledBags

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


def tell_twins(
    labelling: Labelling, digests: Sequence[str], warn: Warn, splits: Sequence[str] | None = None
) -> None:
    """Report bags with the same features that need not stay on one side of a split.

    Args:
        digests: of the bags' features.
        splits: their sides, where they are known.
    """
    sides = splits or ["any"] * len(labelling.bags)
    first: dict[str, tuple[Bag, str]] = {}
    found = []
    for bag, side, digest in zip(labelling.bags, sides, digests, strict=True):
        other, its_side = first.setdefault(digest, (bag, side))
        together = side == its_side if splits else bool(bag.group) and bag.group == other.group
        if other is not bag and not together:
            found.append(f"{other.bag_id!r} and {bag.bag_id!r}")
    if found:
        where = "on two sides of the split" if splits else "perhaps on two sides of a fold"
        warn(
            f"bags with the same features {where}: {found[0]}"
            + (f", and {len(found) - 1} more such" if len(found) > 1 else "")
            + "; give them one group"
        )


def hex_digests(store: Store, ids: Sequence[str]) -> list[str]:
    """The digests of bags by their ids, as a checkpoint keeps them."""
    return [digest.tobytes().hex() for digest in store.digests(ids)]
