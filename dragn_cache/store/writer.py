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
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dragn_cache.errors import StoreError
from dragn_cache.files import sync_folder, sync_tree, write_text
from dragn_cache.manifest import Manifest, write_bags, write_dataset_toml
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
from dragn_cache.store.plan import PartPlan
from dragn_cache.store.schema import (
    StoreDescription,
    Tap,
    read_description,
    refuse_differences,
    write_description,
)


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
    """Collects the rows of one part in any order; `StoreWriter.part` makes and completes it."""

    def __init__(
        self, folder: Path, bags: Sequence[str], sizes: Sequence[int], taps: Sequence[Tap]
    ):
        self.bags, self.sizes, self.taps = list(bags), list(sizes), list(taps)
        self._scratch = {
            tap.name: _ScratchRows(folder / f"tap{k}.rows", tap) for k, tap in enumerate(taps)
        }
        self._records: list[InstanceRecord | None] = [None] * sum(sizes)
        self._failures: dict[int, Failure] = {}
        self._bag_failures: list[Failure] = []

    def put(
        self, rows: Sequence[int], records: Sequence[InstanceRecord], values: dict[str, Array]
    ) -> None:
        """Store rows of all taps (values[tap] is (k, *shape)) under their planned row numbers."""
        for name, scratch in self._scratch.items():
            scratch.put(rows, values[name])
        for row, record in zip(rows, records, strict=True):
            self._records[row] = record

    def fail(self, row: int, failure: Failure) -> None:
        """Record that a planned row could not be used."""
        self._failures[row] = failure

    def fail_bag(self, failure: Failure) -> None:
        """Record that a bag has no image at all."""
        self._bag_failures.append(failure)

    def index(self, views: Sequence[str]) -> PartIndex:
        """The finished part's index: skipped rows are gone, their bags stay."""
        usable = np.array([record is not None for record in self._records], bool)
        planned = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(usable)]).astype(np.int64)[planned]
        for scratch in self._scratch.values():
            scratch.kept = np.flatnonzero(usable)
        records = [record for record in self._records if record is not None]
        hashes = b"".join(record.digest for record in records)
        return PartIndex(
            ids=tuple(self.bags),
            offsets=offsets,
            digests=bag_digests(offsets, self.taps, views, self.rows(views)),
            images=tuple(record.image for record in records),
            boxes=np.array([record.box for record in records], np.int64).reshape(-1, 4),
            order=np.array([record.order for record in records], np.int64),
            image_digests=np.frombuffer(hashes, np.uint8).reshape(-1, 32),
            failures=(
                *self._bag_failures,
                *(self._failures[row] for row in sorted(self._failures)),
            ),
        )

    def rows(self, views: Sequence[str]) -> RowTable:
        """The table of rows that formats and digests read."""
        return {(name, view): scratch for name, scratch in self._scratch.items() for view in views}

    def close(self) -> None:
        for scratch in self._scratch.values():
            scratch.close()


class StoreWriter:
    """A store being made or continued. Use `open_writer`."""

    def __init__(
        self, path: Path, description: StoreDescription, parts: Sequence[PartPlan]
    ) -> None:
        self.path, self.description, self.parts = path, description, list(parts)
        self.format = FORMATS[description.format]

    def part_path(self, part: PartPlan) -> Path:
        return self.path / "parts" / (part.name + self.format.suffix)

    def missing(self) -> list[PartPlan]:
        """Parts that are not complete yet: a part that exists is complete."""
        return [part for part in self.parts if not self.part_path(part).exists()]

    @contextmanager
    def part(
        self, part: PartPlan, bags: Sequence[str], sizes: Sequence[int]
    ) -> Iterator[PartWriter]:
        """Collect one part's rows; on a clean exit the part is written, synced and renamed."""
        folder = self.path / "parts" / f".{part.name}.{scratch_owner()}"
        try:
            folder.mkdir()
            writer = PartWriter(folder, bags, sizes, self.description.taps)
            try:
                yield writer
                self._complete(part, writer, folder)
            finally:
                writer.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _complete(self, part: PartPlan, writer: PartWriter, folder: Path) -> None:
        views = self.description.views
        growing = folder / f"part{self.format.suffix}"
        index = writer.index(views)
        self._require_space(index.rows)
        self.format.write(growing, index, self.description.taps, views, writer.rows(views))
        sync_tree(growing)
        if not self.part_path(part).exists():  # another process may have been faster
            growing.rename(self.part_path(part))
            sync_folder(self.path / "parts")

    def _require_space(self, rows: int) -> None:
        """Raise OSError before writing what would not fit: HDF5 can crash on a full disk."""
        disk = os.statvfs(self.path)
        needed = rows * (self.description.row_bytes + 400) + 2**16
        if disk.f_bavail * disk.f_frsize < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def write_failures(self) -> list[Failure]:
        """Write failures.csv from the parts that exist (a part carries its own) and return it."""
        failures: list[Failure] = []
        for part in self.parts:
            path = self.part_path(part)
            if path.exists():
                try:
                    failures += self.format.read_index(path).failures
                except DAMAGE as error:
                    raise damaged_part(path, error) from error
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(FAILURE_COLUMNS)
        table.writerows([f.bag_id, f.image, f.box, f.reason] for f in failures)
        path = self.path / "failures.csv"
        if not path.exists() or path.read_text(encoding="utf-8") != text.getvalue():
            write_text(path, text.getvalue())
        return failures


def open_writer(
    path: Path, description: StoreDescription, parts: Sequence[PartPlan], manifest: Manifest
) -> StoreWriter:
    """Make a store, or continue one of the same settings.

    Raises:
        StoreMismatchError: the store there has other settings; the message names them.
        StoreError: the folder holds something else.
    """
    if (path / "store.json").exists():
        refuse_differences(path, read_description(path), description)
        (path / "parts").mkdir(exist_ok=True)
        remove_stale_scratch(path / "parts")
        _write_tables(path, parts, manifest)
        return StoreWriter(path, description, parts)
    foreign = [p.name for p in path.iterdir()] if path.is_dir() else []
    left = {name for name in foreign if re.fullmatch(r"\.store\.json\.\d+\.tmp", name)}
    if path.is_file() or set(foreign) - left:
        raise StoreError(
            str(path),
            expected="a store, or a folder that is empty or does not exist yet",
            got="a file" if path.is_file() else f"a folder with {sorted(foreign)[0]}",
            remedy="give another --out",
        )
    for name in left:
        (path / name).unlink()
    # store.json comes first: from then on the folder is known as ours, and the rest is made again.
    path.mkdir(parents=True, exist_ok=True)
    write_description(description, path)
    (path / "parts").mkdir()
    _write_tables(path, parts, manifest)
    return StoreWriter(path, description, parts)


def _write_tables(path: Path, parts: Sequence[PartPlan], manifest: Manifest) -> None:
    """Write the manifest's tables, or replace them where labels, splits or groups have changed."""
    part_of_bag = [part.number for part in parts for _ in range(part.first_bag, part.last_bag)]
    folder, beside = path / "manifest", path / ".manifest"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    write_dataset_toml(manifest, beside / "dataset.toml")
    write_bags(manifest.bags, beside / "bags.csv", added={"part": part_of_bag})
    folder.mkdir(exist_ok=True)
    for new in beside.iterdir():
        old = folder / new.name
        if not old.is_file() or old.read_bytes() != new.read_bytes():
            sync_tree(new)
            new.replace(old)
    shutil.rmtree(beside)
    sync_folder(folder)


def scratch_owner() -> str:
    """The end of a scratch folder's name: host and process."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())}.{os.getpid()}"


def remove_stale_scratch(parts: Path) -> None:
    """Remove scratch folders that dead processes of this host left behind."""
    host = scratch_owner().rsplit(".", 1)[0]
    for folder in parts.glob(".*"):
        _, _, owner = folder.name.lstrip(".").partition(".")
        name, _, pid = owner.rpartition(".")
        if name == host and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():  # an own folder is only left by an earlier process of the same number
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
