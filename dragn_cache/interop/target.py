"""Targets: layouts to export to, and the tables that all of them write."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dragn_cache.files import read_limited
from dragn_cache.interop.bag_files import DESCRIPTION, PROVENANCE, TABLE
from dragn_cache.interop.source import UNKNOWN
from dragn_cache.manifest import Bag, write_bags
from dragn_cache.store import PartIndex, Store, Tap
from dragn_cache.store.part import Array, corner_coords


@dataclass(frozen=True)
class ExportedBag:
    """One bag to export: values (n, C[, h, w]), coords (n, 2), and its part of the index."""

    bag: Bag
    values: Array
    coords: NDArray[np.int64]
    index: PartIndex


class Target(ABC):
    """A layout that a store can be written to.

    Attributes:
        suffix: of the one file or folder that holds everything; empty for a tree of files.
        holds_all: it holds every tap and view, not one tap's clean view.
        named_files: bag ids become file names.
        holds_maps: rows may be maps.
    """

    layout: ClassVar[str]
    is_folder: ClassVar[bool] = True
    holds_all: ClassVar[bool] = False
    named_files: ClassVar[bool] = True
    holds_maps: ClassVar[bool] = True

    @abstractmethod
    def write(self, store: Store, tap: Tap, path: Path, advance: Callable[[], None]) -> None:
        """Write everything to ``path``, which does not exist yet; ``advance`` counts bags."""


def exported_bags(store: Store, tap: Tap) -> Iterator[ExportedBag]:
    """The store's bags in order, one in memory at a time."""
    for bag in store.bags:
        index = store.instances(bag.bag_id)
        values = store.bag(bag.bag_id, tap.name)
        yield ExportedBag(bag, values, corner_coords(index), index)


def encoder_name(store: Store) -> str:
    """The network that made a store's features."""
    return str(store.description.provenance["features"].get("backbone", UNKNOWN))


def bags_without_part(store: Store) -> list[Bag]:
    """The store's bags without the column ``part``, which only a store has."""
    return [
        replace(bag, extra={k: v for k, v in bag.extra.items() if k != "part"})
        for bag in store.bags
    ]


def write_tables(store: Store, tap: Tap, folder: Path) -> None:
    """Write order, labels, splits, groups and provenance, which the files of bags do not hold."""
    write_bags(bags_without_part(store), folder / TABLE)
    description = read_limited(store.path / "manifest" / "dataset.toml")
    (folder / DESCRIPTION).write_bytes(description)
    record = {
        "tap": tap.name,
        "encoder": encoder_name(store),
        "features_sha256": store.description.digest("features"),
        "provenance": store.description.provenance,
    }
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")
