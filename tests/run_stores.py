"""Small feature stores whose labels can be learned, written without any image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.manifest import Bag, Instance, Manifest
from dragn_cache.ragged import RaggedBags
from dragn_cache.store import (
    Failure,
    InstanceRecord,
    Store,
    StoreDescription,
    Tap,
    open_store,
    open_writer,
    plan_parts,
)
from dragn_cache.store.config import Format
from dragn_cache.training.data import LabelledBags
from dragn_cache.types import Task

LABELS = ("actin", "golgi", "nucleus")
CHANNELS, HEIGHT, WIDTH = 5, 2, 3
TAPS = (Tap("layer4", (CHANNELS, HEIGHT, WIDTH), "float32"), Tap("gap", (CHANNELS,), "float32"))

Features = dict[str, NDArray[np.float32]]


def make_bags(count: int, *, seed: int = 0, task: Task = "multilabel") -> list[Bag]:
    """Bags in groups of up to three, of seeded labels; ids have leading zeros."""
    rng = np.random.default_rng(seed)
    bags = []
    for k in range(count):
        if task == "multiclass":
            labels = (LABELS[rng.integers(len(LABELS))],)
        else:
            labels = tuple(label for label in LABELS if rng.random() < 0.5)
        bags.append(Bag(f"{k:03d}", labels, group=f"g{k // 3}" if k % 4 else ""))
    return bags


def make_features(bags: Sequence[Bag], *, seed: int = 0, most: int = 7) -> Features:
    """Maps (n, C, h, w) of 1 to ``most`` instances: the channel of each label a bag has is high."""
    rng = np.random.default_rng(seed)
    features = {}
    for bag in bags:
        n = int(rng.integers(1, most + 1))
        maps = rng.uniform(0, 1, (n, CHANNELS, HEIGHT, WIDTH))
        for label in bag.labels or ():
            maps[:, LABELS.index(label)] += 1.5
        features[bag.bag_id] = maps.astype(np.float32)
    return features


def with_splits(bags: Sequence[Bag]) -> list[Bag]:
    """The bags with every fifth in validation, every other one of the rest in test; no groups."""
    names = ("train", "test", "train", "test", "validation")
    return [replace(bag, split=names[k % 5], group="") for k, bag in enumerate(bags)]


def write_store(
    path: Path,
    bags: Sequence[Bag],
    features: Features,
    *,
    task: Task = "multilabel",
    form: Format = "hdf5",
    provenance: Mapping[str, Mapping[str, Any]] | None = None,
    parts_written: int | None = None,
    augmented: Sequence[Features] = (),
    digests: Mapping[str, bytes] = MappingProxyType({}),
) -> Store:
    """Write a store of two taps, ``layer4`` and its mean ``gap``.

    Args:
        features: maps of each bag; a bag of no rows has one input that could not be used.
        provenance: settings that replace those of one kind.
        parts_written: how many parts to write; None is all.
        digests: of the image of some bags' first instance, 32 bytes; the others have none.
        augmented: maps of each bag in the views "1", "2", …, as many rows as in ``features``.
    """
    kinds: dict[str, dict[str, Any]] = {
        "features": {"backbone": "net", "weights_sha256": "00ff", "size": [41, 53]},
        "numerics": {"dtype": "float32", "batch_size": 4},
        "plan": {"bags": len(bags)},
    }
    for kind, settings in (provenance or {}).items():
        kinds[kind] = {**kinds[kind], **settings}
    views = {str(k): maps for k, maps in enumerate((features, *augmented))}
    description = StoreDescription(form, TAPS, kinds, tuple(views))
    instances = {
        bag.bag_id: tuple(
            Instance(bag.bag_id, f"{bag.bag_id}/{k}.png", k)
            for k in range(max(1, len(features[bag.bag_id])))
        )
        for bag in bags
    }
    manifest = Manifest("tiny", task, LABELS, tuple(bags), instances, Path())
    sizes = [len(instances[bag.bag_id]) for bag in bags]
    parts = plan_parts(sizes, description.row_bytes, 97)
    writer = open_writer(path, description, parts, manifest)
    for part in parts[:parts_written]:
        held = [bags[k] for k in part.bags]
        with writer.part(part) as target:
            row = 0
            for bag in held:
                maps = features[bag.bag_id]
                if not len(maps):
                    target.fail(row, Failure(bag.bag_id, "0.png", "", "truncated"))
                    row += 1
                    continue
                rows = list(range(row, row + len(maps)))
                records = [
                    InstanceRecord(
                        i.image,
                        (0, 0, 53, 41),
                        i.order,
                        bytes(32) if i.order else digests.get(bag.bag_id, bytes(32)),
                    )
                    for i in instances[bag.bag_id]
                ]
                for view, features_of in views.items():
                    values = features_of[bag.bag_id]
                    taps = {"layer4": values, "gap": values.mean((2, 3))}
                    target.put(rows, records, taps, view)
                row += len(maps)
    writer.finish()
    return open_store(path)


def make_data(task: Task = "multilabel", count: int = 41) -> LabelledBags:
    """Bags with splits and their maps, labelled, without a store."""
    bags = with_splits(make_bags(count, task=task))
    features = make_features(bags)
    targets = np.array([[label in (bag.labels or ()) for label in LABELS] for bag in bags], np.int8)
    ragged = RaggedBags.from_list([torch.from_numpy(features[bag.bag_id]) for bag in bags])
    return LabelledBags(ragged, targets, tuple(bag.split for bag in bags), task)
