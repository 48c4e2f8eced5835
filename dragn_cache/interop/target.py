"""What a layout to export to needs, and what all of them share."""

from __future__ import annotations

import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import InputError
from dragn_cache.interop.bag_files import DESCRIPTION, PROVENANCE, TABLE
from dragn_cache.interop.source import UNKNOWN
from dragn_cache.manifest import Bag, write_bags
from dragn_cache.store import PartIndex, Store, Tap
from dragn_cache.store.part import Array

MAX_NAME_BYTES = 255
LONGEST_SUFFIX = ".npy"


@dataclass(frozen=True)
class ExportedBag:
    """One bag on its way out: values (n, C[, h, w]), coords (n, 2), and its part of the index."""

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


def corner_coords(index: PartIndex) -> NDArray[np.int64]:
    """(n, 2): each box's corner (x0, y0); (order, 0) where all corners are the image's own."""
    corners = index.boxes[:, :2]
    if corners.any():
        return np.ascontiguousarray(corners)
    return np.stack([index.order, np.zeros_like(index.order)], axis=1)


def encoder_name(store: Store) -> str:
    """The network that made a store's features."""
    return str(store.description.provenance["features"].get("backbone", UNKNOWN))


def own_bags(store: Store) -> list[Bag]:
    """The store's bags without the column that only a store has."""
    return [
        replace(bag, extra={k: v for k, v in bag.extra.items() if k != "part"})
        for bag in store.bags
    ]


def write_tables(store: Store, tap: Tap, folder: Path) -> None:
    """Write what no file of one bag holds: order, labels, splits, groups, and the provenance."""
    write_bags(own_bags(store), folder / TABLE)
    description = (store.path / "manifest" / "dataset.toml").read_bytes()
    (folder / DESCRIPTION).write_bytes(description)
    record = {
        "tap": tap.name,
        "encoder": encoder_name(store),
        "features_sha256": store.description.digest("features"),
        "provenance": store.description.provenance,
    }
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")


def refuse_bad_names(
    ids: Sequence[str],
    *,
    remedy: str = "export to `layout=hdf5`, zarr or anndata, which keep ids as text",
) -> None:
    """Raise `InputError` for the first bag id that cannot be a file's name, or that is another's
    on a file system that knows no case."""
    seen: dict[str, str] = {}
    for bag_id in ids:
        fault = _name_fault(bag_id)
        folded = unicodedata.normalize("NFC", bag_id).casefold()
        if fault is None and folded in seen:
            fault = f"a name that differs from {seen[folded]!r} only by case"
        if fault is not None:
            raise InputError(
                f"bag {bag_id[:60]!r}",
                expected="an id that can be a file's name",
                got=fault,
                remedy=remedy,
            )
        seen[folded] = bag_id


def _name_fault(bag_id: str) -> str | None:
    if not bag_id:
        return "an empty one"
    if "/" in bag_id or "\\" in bag_id:
        return "a slash in it"
    if bag_id.startswith("."):
        return "a dot at its start"
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in bag_id):
        return "a control character in it"
    if len((bag_id + LONGEST_SUFFIX).encode()) > MAX_NAME_BYTES:
        return f"{len(bag_id.encode())} bytes"
    return None
