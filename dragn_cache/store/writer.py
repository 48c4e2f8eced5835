"""Writing a store: part by part, each complete or absent, byte for byte the same after a kill.

While a part grows its rows go to flat scratch files in a folder beside it, so memory depends
neither on the part nor on the bag. When all rows are there, their number is known, and the part
is written in one pass, fsynced and renamed.
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import ManifestError, StoreError
from dragn_cache.files import sync_folder, sync_tree, write_text
from dragn_cache.manifest import Manifest, read_bags, write_bags, write_dataset_toml
from dragn_cache.store.claims import Claims, living_tokens
from dragn_cache.store.formats import FORMATS
from dragn_cache.store.part import (
    DAMAGE,
    FAILURE_COLUMNS,
    Array,
    Failure,
    PartIndex,
    RowTable,
    bag_digests,
    damaged_part,
)
from dragn_cache.store.plan import PartPlan, bag_plan, instances_of
from dragn_cache.store.schema import (
    CLEAN_VIEW,
    StoreDescription,
    Tap,
    read_description,
    refuse_differences,
    write_description,
)

TABLES = "tables"
"""The claim that is held while store.json, manifest/ or failures.csv is written."""
_INTACT, _LOST = "intact", "lost"
"""A file in every scratch folder; the suffix of one that is being removed."""
_HALF_WRITTEN = re.compile(r"\.(store\.json|failures\.csv)\..*tmp|\.manifest(\..*)?")
_OURS = re.compile(rf"{_HALF_WRITTEN.pattern}|parts")


@dataclass(frozen=True)
class InstanceRecord:
    """What the store keeps about one row besides its features."""

    image: str
    box: tuple[int, int, int, int]
    order: int
    digest: bytes


class _ScratchRows:
    """Rows of one tap in a flat file; ``kept`` are those that turned out usable."""

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
        wanted = self.kept[start:stop]
        out = np.empty((len(wanted), *self.tap.shape), self.tap.dtype)
        for first, last in _runs(wanted):
            piece = out[first:last].reshape(-1).view(np.uint8)
            at = int(wanted[first]) * self.tap.row_bytes
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


class StoreWriter:
    """A store being made or continued, by this process and perhaps others. Use `open_writer`.

    Attributes:
        parts: every part of the store, as planned.
        claims: the parts that this process is working on.
    """

    def __init__(
        self,
        path: Path,
        description: StoreDescription,
        parts: Sequence[PartPlan],
        manifest: Manifest,
    ) -> None:
        self.path, self.description, self.parts = path, description, list(parts)
        self.manifest = manifest
        self.format = FORMATS[description.format]
        self.claims = Claims(path / "parts")

    def part_path(self, part: PartPlan) -> Path:
        return self.path / "parts" / (part.name + self.format.suffix)

    def missing(self) -> list[PartPlan]:
        """Parts that are not complete yet: a part that exists is complete."""
        return [part for part in self.parts if not self.part_path(part).exists()]

    def claim_missing(self) -> Iterator[PartPlan]:
        """One pass over the parts that are missing: each that nobody else works on, claimed."""
        for part in self.parts:
            if self.part_path(part).exists() or not self.claims.acquire(part.name):
                continue
            if self.part_path(part).exists():  # completed between the look and the claim
                self.claims.release(part.name)
                continue
            yield part

    @contextmanager
    def part(self, part: PartPlan) -> Iterator[PartWriter]:
        """Collect one part's rows; on a clean exit the part is written, synced and renamed."""
        folder = self.path / "parts" / f".{part.name}.{self.claims.token}"
        intact = folder / _INTACT
        if not self.claims.holds(part.name):
            self.claims.wait(part.name)
        try:
            folder.mkdir()
            intact.touch()
            description = self.description
            writer = PartWriter(folder, self.manifest, part, description.taps, description.views)
            try:
                yield writer
                self._complete(part, writer, folder)
            finally:
                writer.close()
        except FileNotFoundError:
            # A process that was suspended for longer than its claim lives finds its folder gone:
            # the part is another's now. Any other missing file is an error.
            if intact.exists() or not (self.path / "parts").exists():
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.claims.release(part.name)

    def _complete(self, part: PartPlan, writer: PartWriter, folder: Path) -> None:
        growing = folder / f"part{self.format.suffix}"
        index = writer.index()
        self._require_space(index.rows)
        description = self.description
        self.format.write(growing, index, description.taps, description.views, writer.rows)
        sync_tree(growing)
        # Zarr makes missing folders anew: a part that lost its first files would look complete.
        (folder / _INTACT).stat()
        if not self.part_path(part).exists():  # another process may have been faster
            try:
                growing.rename(self.part_path(part))
            except OSError:  # a folder cannot be renamed onto one that has just come
                if not self.part_path(part).exists():
                    raise
            sync_folder(self.path / "parts")

    def _require_space(self, rows: int) -> None:
        """Raise OSError before writing what would not fit: HDF5 can crash on a full disk."""
        disk = os.statvfs(self.path)
        needed = rows * (self.description.row_bytes + 400) + 2**16
        if disk.f_bavail * disk.f_frsize < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def failures(self) -> list[Failure]:
        """Inputs not used, from the parts that exist (a part carries its own)."""
        found: list[Failure] = []
        for part in self.parts:
            path = self.part_path(part)
            if path.exists():
                ids = {self.manifest.bags[k].bag_id for k in part.bags}
                try:
                    found += [f for f in self.format.read_index(path).failures if f.bag_id in ids]
                except DAMAGE as error:
                    raise damaged_part(path, error) from error
        return found

    def finish(self) -> list[Failure]:
        """Write failures.csv and return what it lists; remove what is nobody's any more.

        That is what dead processes have left, and parts that an update has replaced entirely.
        """
        failures = self.failures()
        self.claims.wait(TABLES)
        remove_leftovers(self.path)
        if self.description.revision and not self.missing():
            self._remove_replaced_parts()
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(FAILURE_COLUMNS)
        table.writerows([f.bag_id, f.image, f.box, f.reason] for f in failures)
        path = self.path / "failures.csv"
        if not path.exists() or path.read_text(encoding="utf-8") != text.getvalue():
            write_text(path, text.getvalue())
        self.claims.release(TABLES)
        return failures

    def _remove_replaced_parts(self) -> None:
        planned = {self.part_path(part) for part in self.parts}
        for path in (self.path / "parts").glob(f"[!.]*{self.format.suffix}"):
            if path not in planned:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give up all claims."""
        self.claims.close()


def open_writer(
    path: Path, description: StoreDescription, parts: Sequence[PartPlan], manifest: Manifest
) -> StoreWriter:
    """Make a store, or continue one of the same settings, perhaps beside other processes.

    Args:
        parts: the plan for a new store; a store that exists keeps its own.

    Raises:
        StoreMismatchError: the store there has other settings; the message names them.
        StoreError: the folder holds something else.
    """
    _refuse_foreign(path)
    (path / "parts").mkdir(parents=True, exist_ok=True)
    with Claims(path / "parts") as claims:
        claims.wait(TABLES)
        if (path / "store.json").exists():
            have = read_description(path)
            refuse_differences(path, have, description)
            description = have
            if have.revision:
                parts = stored_parts(path, manifest)
        else:
            write_description(description, path)
        remove_leftovers(path)
        write_tables(path, parts, manifest)
    return StoreWriter(path, description, parts, manifest)


def _refuse_foreign(path: Path) -> None:
    """Raise StoreError if a folder holds something, and is no store or the beginning of one."""
    if (path / "store.json").exists():
        return
    found = [p for p in path.iterdir() if not _OURS.fullmatch(p.name)] if path.is_dir() else []
    begun = path / "parts"
    found += [p for p in begun.iterdir() if p.name[0] != "."] if begun.is_dir() else []
    if path.is_file() or found:
        raise StoreError(
            str(path),
            expected="a store, or a folder that is empty or does not exist yet",
            got="a file" if path.is_file() else f"a folder with {min(p.name for p in found)}",
            remedy="give another --out",
        )


def stored_parts(path: Path, manifest: Manifest) -> list[PartPlan]:
    """The plan as manifest/bags.csv has it: which of a manifest's bags are in which part.

    Raises:
        StoreError: the table is lost, or does not have the manifest's bags.
    """
    places = part_of_bags(path)
    held: dict[int, list[int]] = {}
    for k, bag in enumerate(manifest.bags):
        if bag.bag_id not in places:
            raise StoreError(
                str(path / "manifest" / "bags.csv"),
                expected="the part of every bag",
                got=f"none for bag {bag.bag_id!r}",
                remedy="extract with --update: it finds the bags in the parts",
            )
        held.setdefault(places[bag.bag_id], []).append(k)
    return [PartPlan(number, tuple(bags)) for number, bags in sorted(held.items())]


def part_of_bags(path: Path) -> dict[str, int]:
    """Bag id → number of its part, from manifest/bags.csv; empty if that cannot be read."""
    try:
        bags, _, _ = read_bags(path / "manifest" / "bags.csv")
    except ManifestError:
        return {}
    places = {bag.bag_id: bag.extra.get("part", "") for bag in bags}
    return {bag_id: int(part) for bag_id, part in places.items() if part.isdigit()}


def write_tables(path: Path, parts: Sequence[PartPlan], manifest: Manifest) -> None:
    """Write the manifest's tables, or replace them where labels, splits or groups have changed."""
    number_of = {k: part.number for part in parts for k in part.bags}
    folder = path / "manifest"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".manifest.") as beside:
        added = {"part": [number_of[k] for k in range(len(manifest.bags))]}
        write_dataset_toml(manifest, Path(beside) / "dataset.toml")
        write_bags(manifest.bags, Path(beside) / "bags.csv", added=added)
        for new in Path(beside).iterdir():
            old = folder / new.name
            if not old.is_file() or old.read_bytes() != new.read_bytes():
                sync_tree(new)
                new.replace(old)
    sync_folder(folder)


def remove_leftovers(path: Path) -> None:
    """Remove what dead processes have left in a store: claims, scratch, half-written files.

    Only for the holder of the claim `TABLES`: nobody else writes the files beside the parts.
    """
    # The folders first: one that is made after the look at the claims belongs to a new claim.
    folders = [folder for folder in (path / "parts").glob(".?????.*") if folder.is_dir()]
    folders.sort(reverse=True)  # one that a killed process was removing comes before its namesake
    tokens = living_tokens(path / "parts")
    for folder in folders:
        if folder.name.rpartition(".")[2] not in tokens:
            # Renamed before it is emptied: if its holder lives after all (it was suspended), it
            # cannot complete a part of which some files are gone.
            emptied = folder.with_name(f"{folder.name}.{_LOST}")
            with suppress(OSError):
                folder.rename(emptied)
            shutil.rmtree(emptied, ignore_errors=True)
    for left in path.iterdir():
        if _HALF_WRITTEN.fullmatch(left.name):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
