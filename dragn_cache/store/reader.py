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

from dragn_cache.checksums import CHECKSUMS
from dragn_cache.errors import ManifestError, StoreError, UnknownNameError, foreign
from dragn_cache.files import read_text
from dragn_cache.manifest import Bag, read_bags
from dragn_cache.manifest.shared import image_keys
from dragn_cache.store.formats import FORMATS
from dragn_cache.store.part import (
    Array,
    Failure,
    PartIndex,
    Pieces,
    empty_rows,
    reading_part,
    require_bags,
    require_index,
    require_sealed,
)
from dragn_cache.store.plan import bags_digest, is_part_number
from dragn_cache.store.schema import KINDS, StoreDescription, Tap, read_description
from dragn_cache.store.tables import changed_tables
from dragn_cache.types import CLEAN_VIEW, Warn

# Threads that read: one alone spends most of its time on the first use of new memory pages.
READERS = 4
RENEW = (
    f"if you changed it on purpose, run sha256sum bags.csv dataset.toml > {CHECKSUMS} in that "
    "folder; else run the same extract or import command again: it rewrites it"
)
"""What to do about a table that is not as it was written."""


class Store:
    """A feature store on disk, opened for reading; it may still be incomplete.

    Attributes:
        path: its folder.
        description: what store.json says.
        bags: the manifest's bags, with labels, splits and groups, in order.
        labels: label names in order.
        task: ``multilabel`` or ``multiclass``.
        changed_tables: see `tables.changed_tables`, when it was opened.
    """

    def __init__(self, path: Path, warn: Warn = lambda text: None) -> None:
        self.path = path
        self.description: StoreDescription = read_description(path)
        self._format = FORMATS[self.description.format]
        self.changed_tables = changed_tables(path)
        toml = _read_label_order(path)
        self.name: str = toml.get("name", path.name)
        try:
            self.bags, self.labels, self.task = read_bags(
                path / "manifest" / "bags.csv", labels=toml.get("labels"), task=toml.get("task")
            )
        except ManifestError as error:
            if not self.changed_tables:
                raise
            raise StoreError(
                str(path / "manifest" / self.changed_tables[0]),
                expected="the file as it was written",
                got=str(error),
                remedy=RENEW,
            ) from error
        self._part_of = {bag.bag_id: _part_number(path, bag) for bag in self.bags}
        self._require_planned()
        for fault in self.table_faults():
            warn(fault)
        self._planned: dict[int, list[str]] = {}
        for bag_id, part in self._part_of.items():
            self._planned.setdefault(part, []).append(bag_id)
        self._index: dict[int, PartIndex] = {}
        self._places: dict[str, tuple[int, int, int]] = {}

    def _require_planned(self) -> None:
        """Raise `StoreError` unless the table has the bags and parts that were planned."""
        description = self.description
        if description.is_sealed and bags_digest(self._part_of.items()) != description.bags:
            raise StoreError(
                str(self.path / "manifest" / "bags.csv"),
                expected="the bags and parts that store.json has a digest of",
                got="others",
                remedy="restore it, or run the same extract or import command again (or extract "
                "with `update=True`): it rewrites this table",
            )

    def table_faults(self) -> list[str]:
        """A line for each table in ``manifest/`` whose labels or texts are not as written."""
        folder = self.path / "manifest"
        return [
            f"{folder / name}: not as it was written; {RENEW}" for name in self.changed_tables or ()
        ]

    # --- contents ---

    @property
    def bag_ids(self) -> list[str]:
        return [bag.bag_id for bag in self.bags]

    @cached_property
    def parts(self) -> list[int]:
        """Numbers of all planned parts."""
        return sorted(self._planned)

    def planned(self, number: int) -> list[str]:
        """Ids of the bags that a part was planned to hold, in order."""
        return self._planned[number]

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

    def try_reading(self, number: int) -> None:
        """Raise `DamagedPartError` if a library would not survive a part, which may be of others.

        Slower than reading it: for whoever looks at a store for the first time.
        """
        with reading_part(self.part_path(number)):
            self._format.try_reading(self.part_path(number))

    def _read_index(self, number: int) -> PartIndex:
        with reading_part(self.part_path(number)):
            index = self._format.read_index(self.part_path(number))
            require_sealed(index, self.description)
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

    def plans(self) -> list[bytes]:
        """The digest of each bag's planned instances, in the order of bags; see `bag_plan`."""
        of_bag: dict[str, bytes] = {}
        for number in self.parts:
            index, ids = self.index(number), set(self._planned[number])
            of_bag |= {b: bytes(p) for b, p in zip(index.ids, index.plans, strict=True) if b in ids}
        return [of_bag[bag_id] for bag_id in self.bag_ids]

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

    def image_keys(self, bags: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The instances of some bags: the number of each one's bag, and what it shows.

        See `dragn_cache.manifest.shared.image_keys`. Those whose image is not known are left out:
        features of other tools have the digest of the file of features in its place.
        """
        members, keys = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        by_part: dict[int, list[tuple[int, int, int]]] = {}
        if "source_layout" not in self.description.provenance["features"]:
            for k, bag_id in enumerate(bags):
                part, first, last = self._place(bag_id)
                by_part.setdefault(part, []).append((k, first, last))
        for number, places in sorted(by_part.items()):
            index = self._index.get(number) or self._read_index(number)  # not kept, as above
            of_row = np.full(index.rows, -1, np.int64)
            for k, first, last in places:
                of_row[first:last] = k
            chosen = (of_row >= 0) & index.image_digests.any(axis=1)
            members.append(of_row[chosen])
            keys.append(image_keys(index.image_digests[chosen], index.boxes[chosen]))
        return np.concatenate(members), np.concatenate(keys)

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
            require_sealed(bags, self.description)
            require_bags(bags, planned)
        edges = bags.offsets.tolist()
        position = {bag_id: k for k, bag_id in enumerate(bags.ids)}
        for planned_id in planned:
            k = position[planned_id]
            self._places[planned_id] = (part, edges[k], edges[k + 1])


class PartRows:
    """Rows of one tap and view of a part, read piece by piece."""

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


def open_store(path: str | Path, *, warn: Warn = lambda text: None) -> Store:
    """Open a feature store for reading.

    Args:
        warn: called with one line for each table whose labels, splits, groups or texts are not
            those that were written: they may be replaced, and may be damaged.

    Raises:
        StoreError: there is none at ``path``, or its store.json or plan is damaged.
    """
    return Store(Path(path), warn)
