"""Reading a store: one bag, or many as one array of rows plus offsets."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import DamagedPartError, StoreError, UnknownNameError, foreign
from dragn_cache.files import read_text
from dragn_cache.manifest import Bag, read_bags
from dragn_cache.store.formats import FORMATS
from dragn_cache.store.part import (
    Array,
    Failure,
    PartIndex,
    Pieces,
    bag_digests,
    empty_rows,
    reading_part,
    require_bags,
    require_index,
)
from dragn_cache.store.plan import is_part_number
from dragn_cache.store.schema import KINDS, StoreDescription, Tap, read_description
from dragn_cache.types import CLEAN_VIEW

# Threads that read: one alone spends most of its time on the first use of new memory pages.
READERS = 4


class Store:
    """A feature store on disk, opened for reading; it may still be incomplete.

    Attributes:
        path: its folder.
        description: what store.json says.
        bags: the manifest's bags, with labels, splits and groups, in order.
        labels: label names in order.
        task: ``multilabel`` or ``multiclass``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description: StoreDescription = read_description(path)
        self._format = FORMATS[self.description.format]
        toml = _read_label_order(path)
        self.name: str = toml.get("name", path.name)
        self.bags, self.labels, self.task = read_bags(
            path / "manifest" / "bags.csv", labels=toml.get("labels"), task=toml.get("task")
        )
        self._part_of = {bag.bag_id: _part_number(path, bag) for bag in self.bags}
        self._planned: dict[int, list[str]] = {}
        for bag_id, part in self._part_of.items():
            self._planned.setdefault(part, []).append(bag_id)
        self._index: dict[int, PartIndex] = {}
        self._places: dict[str, tuple[int, int, int]] = {}

    # --- contents ---

    @property
    def bag_ids(self) -> list[str]:
        return [bag.bag_id for bag in self.bags]

    @cached_property
    def parts(self) -> list[int]:
        """Numbers of all planned parts."""
        return sorted(self._planned)

    def part_path(self, number: int) -> Path:
        return self.path / "parts" / f"{number:05d}{self._format.suffix}"

    def missing_parts(self) -> list[int]:
        """Parts that extract has still to write."""
        return [number for number in self.parts if not self.part_path(number).exists()]

    def require_complete(self) -> None:
        """Raise `StoreError` if parts are missing."""
        missing = self.missing_parts()
        if missing:
            raise StoreError(
                str(self.path),
                expected=f"{len(self.parts)} parts",
                got=f"{len(self.parts) - len(missing)}",
                remedy="run the same extract command again (or import); it goes on from there",
            )

    def tap(self, name: str | None = None) -> Tap:
        """A tap by name; None is the first."""
        taps = {tap.name: tap for tap in self.description.taps}
        if name is None:
            return self.description.taps[0]
        if name not in taps:
            raise UnknownNameError("tap", name, taps)
        return taps[name]

    def index(self, number: int) -> PartIndex:
        """Everything in a part except its features (cached)."""
        if number not in self._index:
            self._index[number] = self._read_index(number)
        return self._index[number]

    def _read_index(self, number: int) -> PartIndex:
        with reading_part(self.part_path(number)):
            index = self._format.read_index(self.part_path(number))
            require_index(index, self._planned[number])
        return index

    def instances(self, bag_id: str) -> PartIndex:
        """Everything but the features of one bag: its piece of its part's index."""
        part, first, last = self._place(bag_id)
        index = self.index(part)
        k = index.ids.index(bag_id)
        return PartIndex(
            ids=(bag_id,),
            offsets=np.array([0, last - first], np.int64),
            digests=index.digests[k : k + 1],
            plans=index.plans[k : k + 1],
            images=index.images[first:last],
            boxes=index.boxes[first:last],
            order=index.order[first:last],
            image_digests=index.image_digests[first:last],
            failures=tuple(f for f in index.failures if f.bag_id == bag_id),
        )

    def failures(self) -> list[Failure]:
        """Inputs that could not be used, over all parts that exist."""
        missing = set(self.missing_parts())
        return [
            failure
            for number in self.parts
            if number not in missing
            for failure in self.index(number).failures
            if self._part_of.get(failure.bag_id) == number  # else an update has superseded it
        ]

    def rows(self, number: int) -> int:
        """Instances of a part's bags, without those that an update has superseded."""
        places = [self._place(bag_id) for bag_id in self._planned[number]]
        return sum(last - first for _, first, last in places)

    def sizes(self, bags: Sequence[str]) -> NDArray[np.int64]:
        """(B,): instances of some bags, by their ids."""
        places = [self._place(bag_id) for bag_id in bags]
        return np.array([last - first for _, first, last in places], np.int64)

    def digests(self, bags: Sequence[str]) -> NDArray[np.uint8]:
        """(B, 32): the digest of each bag's features, by their ids; see `bag_digests`."""
        places = [self._place(bag_id)[0] for bag_id in bags]
        of_bag: dict[str, NDArray[np.uint8]] = {}
        for number in sorted(set(places)):
            # Read for the digests alone, an index is not kept: with every image's name it is large.
            index = self._index.get(number) or self._read_index(number)
            ids = set(self._planned[number])
            of_bag |= {b: d for b, d in zip(index.ids, index.digests, strict=True) if b in ids}
        return np.array([of_bag[bag_id] for bag_id in bags], np.uint8).reshape(-1, 32)

    def summary(self) -> dict[str, Any]:
        """Contents and provenance of the store, as JSON values."""
        missing = self.missing_parts()
        present = [number for number in self.parts if number not in missing]
        files = [path for path in self.path.rglob("*") if path.is_file()]
        return {
            "name": self.name,
            "format": self.description.format,
            "task": self.task,
            "labels": list(self.labels),
            "bags": len(self.bags),
            "instances": sum(self.rows(number) for number in present),
            "parts": len(self.parts),
            "missing_parts": missing,
            "bytes": sum(path.stat().st_size for path in files),
            "failures": len(self.failures()),
            "made_from": dict(self.description.made_from),
            "revision": self.description.revision,
            "views": list(self.description.views),
            "taps": [{**asdict(t), "row_bytes": t.row_bytes} for t in self.description.taps],
            "digests": {kind: self.description.digest(kind) for kind in KINDS},
            "provenance": self.description.provenance,
        }

    # --- features ---

    def bag(self, bag_id: str, tap: str | None = None, *, view: str = CLEAN_VIEW) -> Array:
        """Features of one bag, (n, C[, h, w]) in the store's dtype."""
        values, _ = self.load(tap, bags=[bag_id], view=view)
        return values

    def load(
        self,
        tap: str | None = None,
        *,
        bags: Sequence[str] | None = None,
        view: str = CLEAN_VIEW,
    ) -> tuple[Array, NDArray[np.int64]]:
        """Features of many bags as one array of rows.

        Args:
            tap: a tap's name; None is the first.
            bags: bag ids in the order of the result; None is all, in the manifest's order.
            view: name of the view; "0" is clean.

        Returns:
            values (N, C[, h, w]) in the store's dtype, and offsets (B+1,): bag k has the rows
            offsets[k]:offsets[k+1] (none, if none of its inputs was usable).

        Raises:
            StoreError: an unknown bag or view, or a part that is not written yet.
            DamagedPartError: a part does not hold what was written.
        """
        chosen = self.tap(tap)
        if view not in self.description.views:
            raise UnknownNameError("view", view, self.description.views)
        ids = self.bag_ids if bags is None else list(bags)
        places = np.array([self._place(bag_id) for bag_id in ids], np.int64).reshape(-1, 3)
        offsets = np.concatenate([[0], np.cumsum(places[:, 2] - places[:, 1])])
        values = empty_rows((int(offsets[-1]), *chosen.shape), chosen.dtype)

        def read(part: int, pieces: Pieces) -> None:
            with reading_part(self.part_path(part)):
                self._format.read_rows(self.part_path(part), chosen, view, pieces)

        by_part = _pieces(places, values)
        with ThreadPoolExecutor(READERS) as readers:
            for _ in readers.map(read, by_part, by_part.values()):
                pass
        return values, offsets

    def _place(self, bag_id: str) -> tuple[int, int, int]:
        """Part, first and last row of a bag."""
        if bag_id not in self._places:
            self._read_places(bag_id)
        return self._places[bag_id]

    def _read_places(self, bag_id: str) -> None:
        """Read the places of all bags of a bag's part, and keep them."""
        if bag_id not in self._part_of:
            raise UnknownNameError(
                "bag", bag_id, self._part_of, remedy=f"see {self.path / 'manifest' / 'bags.csv'}"
            )
        part = self._part_of[bag_id]
        if not self.part_path(part).exists():
            self.require_complete()
        planned = self._planned[part]
        with reading_part(self.part_path(part)):
            bags = self._format.read_bags(self.part_path(part))
            require_bags(bags, planned)
        edges = bags.offsets.tolist()
        position = {bag_id: k for k, bag_id in enumerate(bags.ids)}
        for planned_id in planned:
            k = position[planned_id]
            self._places[planned_id] = (part, edges[k], edges[k + 1])

    # --- checking ---

    def verify_part(self, number: int) -> list[tuple[str, str]]:
        """Compare every bag of a part with its digest.

        Returns:
            (bag id, what is wrong) for each damaged bag; every bag of a part that cannot be read.
        """
        planned = self._planned[number]
        self._index.pop(number, None)
        try:
            index = self.index(number)
            taps, views = self.description.taps, self.description.views
            table = {(tap.name, v): _PartRows(self, number, tap, v) for tap in taps for v in views}
            digests = bag_digests(index.offsets, taps, views, dict(table))
        except DamagedPartError as error:
            return [(bag_id, error.got) for bag_id in planned]
        wrong = (digests != index.digests).any(axis=1)
        damaged = {bag_id for bag_id, bad in zip(index.ids, wrong, strict=True) if bad}
        return [(b, "features differ from their digest") for b in planned if b in damaged]


class _PartRows:
    """Rows of one tap and view of a part, for digests."""

    def __init__(self, store: Store, part: int, tap: Tap, view: str) -> None:
        self.store, self.part, self.tap, self.view = store, part, tap, view

    def read(self, start: int, stop: int) -> Array:
        out = np.empty((stop - start, *self.tap.shape), self.tap.dtype)
        path = self.store.part_path(self.part)
        with reading_part(path):
            self.store._format.read_rows(path, self.tap, self.view, [(start, out)])
        return out


def _pieces(places: NDArray[np.int64], values: Array) -> dict[int, list[tuple[int, Array]]]:
    """The pieces to read from each part; rows that follow each other are one piece.

    Args:
        places: (B, 3) part, first and last row of each bag.
        values: (N, ...) where the bags' rows go, one after the other.
    """
    places = places[places[:, 2] > places[:, 1]]
    follows = (places[1:, 0] == places[:-1, 0]) & (places[1:, 1] == places[:-1, 2])
    edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(places)]
    by_part: dict[int, list[tuple[int, Array]]] = {}
    row = 0
    for k, end in itertools.pairwise(edges if len(places) else []):
        part, start, stop = int(places[k, 0]), int(places[k, 1]), int(places[end - 1, 2])
        by_part.setdefault(part, []).append((start, values[row : row + stop - start]))
        row += stop - start
    return by_part


def _part_number(path: Path, bag: Bag) -> int:
    text = bag.extra.get("part", "")
    if not is_part_number(text):
        raise StoreError(
            f"{path / 'manifest' / 'bags.csv'}:{bag.line}",
            expected="the number of a part in the column part",
            got=repr(text),
            remedy="run the same extract command again: it rewrites this table",
        )
    return int(text)


def _read_label_order(path: Path) -> dict[str, Any]:
    toml = path / "manifest" / "dataset.toml"
    with foreign(
        toml,
        expected="the data set's task and labels",
        remedy="restore the file, or extract again",
        kind=StoreError,
    ):
        return tomllib.loads(read_text(toml))


def open_store(path: str | Path) -> Store:
    """Open a feature store for reading.

    Raises:
        StoreError: there is none at ``path``, or its store.json is damaged.
    """
    return Store(Path(path))
