"""Labels joined with features: the bags to learn from, their labels, splits and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.loading.splits import make_split, require_split
from dragn_cache.manifest import Bag, read_bags
from dragn_cache.manifest.doubts import warn_doubts
from dragn_cache.manifest.faults import check_bags
from dragn_cache.manifest.reading import columns_given
from dragn_cache.store import Store
from dragn_cache.store.leaks import warn_leaks
from dragn_cache.texts import by_look, difference, look
from dragn_cache.types import Task, Warn


@dataclass(frozen=True)
class Labelling:
    """Some of a store's bags, with labels, splits and groups; the labels' names; the task."""

    bags: tuple[Bag, ...]
    labels: tuple[str, ...]
    task: Task

    @property
    def ids(self) -> list[str]:
        """The bags' ids."""
        return [bag.bag_id for bag in self.bags]

    def targets(self) -> NDArray[np.int8]:
        """(B, L) of 0 and 1."""
        column = {label: k for k, label in enumerate(self.labels)}
        targets = np.zeros((len(self.bags), len(self.labels)), np.int8)
        for row, bag in enumerate(self.bags):
            for label in bag.labels or ():
                targets[row, column[label]] = 1
        return targets


def read_labelling(
    store: Store,
    bags_csv: Path | None = None,
    *,
    labels: Sequence[str] | None = None,
    task: Task | None = None,
) -> Labelling:
    """Labels, splits and groups of a store's bags, from the store or from another table.

    A column that the other table lacks is taken from the store. One that it has replaces the
    store's, empty cells too, so that two splits or groupings are never mixed. Bags that it lacks
    are left out.

    Raises:
        UnknownNameError: a bag that the store does not have.
        ManifestError: a label, a split, or a bag's number of labels that is not allowed.
    """
    if bags_csv is None:
        return _require_sound(
            Labelling(store.bags, tuple(labels or store.labels), task or store.task)
        )
    known = {bag.bag_id: bag for bag in store.bags}
    listed, table_labels, table_task = read_bags(bags_csv, image_rows=True)
    for bag in listed:
        if bag.bag_id not in known:
            raise UnknownNameError(
                "bag",
                bag.bag_id,
                known,
                remedy=f"correct {bag.file}:{bag.line}, or extract that bag's images first",
            )
    absent = {"labels", "split", "group"} - columns_given(bags_csv)
    bags = []
    for bag in listed:
        old = known[bag.bag_id]
        bags.append(replace(bag, **{name: getattr(old, name) for name in absent}))
    same = "labels" in absent or set(table_labels) <= set(store.labels)
    order = labels or (store.labels if same else table_labels)
    return _require_sound(
        Labelling(tuple(bags), tuple(order), task or (store.task if same else table_task))
    )


def _require_sound(labelling: Labelling) -> Labelling:
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
            remedy="give a table with bag_id,labels",
        )
    if not any(bag.labels for bag in labelling.bags):
        raise InputError(
            "labels",
            expected="a bag with a label",
            got=f"empty labels for all {len(labelling.bags)} bags",
            remedy="fill in the labels column",
        )


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
    require_split(labelling.ids, splits, groups)
    return splits


def warn_misleading(
    store: Store, labelling: Labelling, warn: Warn, splits: Sequence[str] | None = None
) -> None:
    """Report what may make results better or worse than they are: names, and leaks.

    Args:
        splits: the bags' sides, where they are known.
    """
    warn_doubts(labelling.bags, labelling.task, warn)
    warn_leaks(store, labelling.bags, warn, splits)


def warn_seen(store: Store, labelling: Labelling, seen: Mapping[str, str], warn: Warn) -> None:
    """Report bags to be scored that share features or images with others that a run has seen, or
    whose ids look like theirs.

    Args:
        seen: digests by the ids of the run's training and validation bags.
    """
    scored = set(labelling.ids)
    alike = by_look(seen)
    twins = [b for b in labelling.ids if b not in seen and look(b) in alike]
    if twins:
        other = alike[look(twins[0])]
        more = f", and {len(twins) - 1} more such" if len(twins) > 1 else ""
        warn(
            f"the run has seen a bag {other!r}, and {twins[0]!r} is scored as new: they differ by "
            f"{difference(twins[0], other)}{more}"
        )
    others = [bag for bag in store.bags if bag.bag_id in seen and bag.bag_id not in scored]
    own = hex_digests(store, [bag.bag_id for bag in others])
    others = [b for b, digest in zip(others, own, strict=True) if digest == seen[b.bag_id]]
    sides = ["seen"] * len(others) + ["scored"] * len(labelling.bags)
    warn_leaks(store, [*others, *labelling.bags], warn, sides)


def hex_digests(store: Store, ids: Sequence[str]) -> list[str]:
    """The digests of bags by their ids, as a checkpoint keeps them."""
    return [digest.tobytes().hex() for digest in store.digests(ids)]
