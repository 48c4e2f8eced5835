"""Writing one part: rows go to scratch files, then in one pass into its format."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import StoreError
from dragn_cache.manifest import Manifest
from dragn_cache.store.part import Array, Failure, PartIndex, RowTable, bag_digests
from dragn_cache.store.plan import PartPlan, bag_plan, instances_of
from dragn_cache.store.schema import Tap
from dragn_cache.types import CLEAN_VIEW


@dataclass(frozen=True)
class InstanceRecord:
    """One row of a store without its features: image, box, position in the bag, file digest."""

    image: str
    box: tuple[int, int, int, int]
    order: int
    digest: bytes


class _ScratchRows:
    """Rows of one tap in a flat file, by planned row number; ``kept``: numbers of usable rows."""

    def __init__(self, path: Path, tap: Tap) -> None:
        self.tap = tap
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self.kept = np.empty(0, np.int64)

    def put(self, rows: Sequence[int], values: Array) -> None:
        values = np.ascontiguousarray(values, dtype=self.tap.dtype)
        for first, last in _runs(rows):
            data = values[first:last].reshape(-1).view(np.uint8).data
            at = rows[first] * self.tap.row_bytes
            while len(data):
                count = os.pwrite(self.file, data, at)
                data, at = data[count:], at + count

    def read(self, start: int, stop: int) -> Array:
        numbers = self.kept[start:stop]
        out = np.empty((len(numbers), *self.tap.shape), self.tap.dtype)
        for first, last in _runs(numbers):
            piece = out[first:last].reshape(-1).view(np.uint8)
            at = int(numbers[first]) * self.tap.row_bytes
            if os.preadv(self.file, [piece.data], at) != piece.nbytes:
                raise StoreError(
                    "scratch file",
                    expected=f"{piece.nbytes} bytes at {at}",
                    got="fewer",
                    remedy="free disk space and run the same command again",
                )
        return out

    def close(self) -> None:
        os.close(self.file)


def _runs(rows: Sequence[int] | Array) -> Iterator[tuple[int, int]]:
    """Ranges of positions in which the row numbers rise by one."""
    numbers = np.asarray(rows, np.int64)
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    edges = [0, *cuts.tolist(), len(numbers)]
    for first, last in itertools.pairwise(edges):
        if last > first:
            yield first, last


class PartWriter:
    """Collects the rows of one part in any order; `StoreWriter.part` makes and completes it.

    Attributes:
        bags: ids of its bags; ``sizes``: their instances; ``plans``: their `bag_plan`.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        part: PartPlan,
        taps: Sequence[Tap],
        views: Sequence[str],
    ):
        self.bags = [manifest.bags[k].bag_id for k in part.bags]
        self.sizes = [len(instances_of(manifest, k)) for k in part.bags]
        self.plans = [bag_plan(manifest, k) for k in part.bags]
        self.taps, self.views = list(taps), list(views)
        self._scratch = {
            (tap.name, view): _ScratchRows(folder / f"tap{k}.{view}.rows", tap)
            for k, tap in enumerate(taps)
            for view in views
        }
        self._records: list[InstanceRecord | None] = [None] * sum(self.sizes)
        self._failures: dict[int, Failure] = {}
        self._bag_failures = [
            Failure(bag_id, "", "", "the manifest has no image for this bag")
            for bag_id, size in zip(self.bags, self.sizes, strict=True)
            if not size
        ]

    def put(
        self,
        rows: Sequence[int],
        records: Sequence[InstanceRecord],
        values: dict[str, Array],
        view: str = CLEAN_VIEW,
    ) -> None:
        """Store rows of all taps (values[tap] is (k, *shape)) under their planned row numbers."""
        for tap in self.taps:
            self._scratch[tap.name, view].put(rows, values[tap.name])
        for row, record in zip(rows, records, strict=True):
            self._records[row] = record

    def fail(self, row: int, failure: Failure) -> None:
        """Record that a planned row could not be used."""
        self._failures[row] = failure

    def index(self) -> PartIndex:
        """The finished part's index: skipped rows are gone, their bags stay."""
        usable = np.array([record is not None for record in self._records], bool)
        planned = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(usable)]).astype(np.int64)[planned]
        for scratch in self._scratch.values():
            scratch.kept = np.flatnonzero(usable)
        records = [record for record in self._records if record is not None]
        return PartIndex(
            ids=tuple(self.bags),
            offsets=offsets,
            digests=bag_digests(offsets, self.taps, self.views, self.rows),
            plans=_hashes(self.plans),
            images=tuple(record.image for record in records),
            boxes=np.array([record.box for record in records], np.int64).reshape(-1, 4),
            order=np.array([record.order for record in records], np.int64),
            image_digests=_hashes([record.digest for record in records]),
            failures=(
                *self._bag_failures,
                *(self._failures[row] for row in sorted(self._failures)),
            ),
        )

    @property
    def rows(self) -> RowTable:
        """The table of rows that formats and digests read."""
        return dict(self._scratch)

    def close(self) -> None:
        for scratch in self._scratch.values():
            scratch.close()


def _hashes(digests: Sequence[bytes]) -> NDArray[np.uint8]:
    """Digests of 32 bytes as (k, 32) uint8."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
