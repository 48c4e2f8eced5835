"""Comparing a store with its digests, and moving damaged parts aside, so that the same extraction
writes only those again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dragn_cache.checksums import CHECKSUMS
from dragn_cache.errors import DamagedPartError
from dragn_cache.files import (
    MOST_TABLE_BYTES,
    read_limited,
    sync_folder,
)
from dragn_cache.store.claims import Claims
from dragn_cache.store.part import bag_digests
from dragn_cache.store.plan import plans_digest
from dragn_cache.store.reader import PartRows, Store, open_store
from dragn_cache.store.tables import TABLES, failures_text
from dragn_cache.types import Progress, Say

ASIDE = "damaged"
PLAN_KEYS = ("manifest_sha256", "sources_sha256")
"""Where the settings of the plan have `manifest_digest`, in extracted and in imported stores."""


@dataclass(frozen=True)
class PartFaults:
    """The faults of one part.

    Attributes:
        number: of the part.
        bags: (bag id, the fault) for each damaged bag; every bag of a part whose index is damaged.
        was_read: False where the machine, not the file, is the reason: permission, memory, a lock,
            a disk's error. Nothing is then known of the part, and it is not moved aside.
    """

    number: int
    bags: tuple[tuple[str, str], ...]
    was_read: bool = True


@dataclass(frozen=True)
class StoreFaults:
    """The result of `verify_store`.

    Attributes:
        parts: those with faults.
        missing: numbers of planned parts that do not exist.
        tables: a line for each file beside the parts that is not as it was written.
        unchecked: a line about what has no digest in a store of an older version; else "".
    """

    parts: tuple[PartFaults, ...]
    missing: tuple[int, ...]
    tables: tuple[str, ...]
    unchecked: str

    @property
    def damaged(self) -> tuple[int, ...]:
        """Numbers of the parts that hold other bytes than were written."""
        return tuple(part.number for part in self.parts if part.was_read)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing and nothing is damaged."""
        return not (self.parts or self.missing or self.tables)


def verify_store(store: Store, progress: Progress = lambda done, total: None) -> StoreFaults:
    """Compare all that a store holds with its digests; reads every byte, changes nothing."""
    store = open_store(store.path)  # what was read of it before may have changed since
    missing = store.missing_parts()
    present = [number for number in store.parts if number not in missing]
    parts = []
    for done, number in enumerate(present, start=1):
        faults = verify_part(store, number)
        parts += [faults] if faults.bags else []
        progress(done, len(present))
    tables = store.table_faults()
    if store.description.is_sealed and store.changed_tables is None:
        path = store.path / "manifest" / CHECKSUMS
        tables.append(f"{path}: lost; the same extract or import command writes it again")
    if not parts and not missing:
        tables += [*_failures_fault(store), *_plan_fault(store)]
    unchecked = "" if store.description.is_sealed else _unchecked(store)
    return StoreFaults(tuple(parts), tuple(missing), tuple(tables), unchecked)


def verify_part(store: Store, number: int) -> PartFaults:
    """Compare a part's index with its seals, and every bag of it with its digest."""
    planned = store.planned(number)
    try:
        store.try_reading(number)
        index = store.index(number)
        taps, views = store.description.taps, store.description.views
        table = {(tap.name, v): PartRows(store, number, tap, v) for tap in taps for v in views}
        digests = bag_digests(index.offsets, taps, views, dict(table))
    except DamagedPartError as error:
        faults = tuple((bag_id, error.got) for bag_id in planned)
        return PartFaults(number, faults, was_read=not _is_of_the_machine(error.__cause__))
    wrong = (digests != index.digests).any(axis=1)
    damaged = {bag_id for bag_id, bad in zip(index.ids, wrong, strict=True) if bad}
    what = "features differ from their digest"
    return PartFaults(number, tuple((bag_id, what) for bag_id in planned if bag_id in damaged))


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, came from the system and not from a file's bytes."""
    while error is not None:
        is_lost = isinstance(error, FileNotFoundError)  # a Zarr part without one of its files
        has_code = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, MemoryError) or (has_code and not is_lost):
            return True
        error = error.__cause__ or error.__context__
    return False


def _failures_fault(store: Store) -> list[str]:
    """A line if failures.csv, where there is one, is not what the parts say."""
    path = store.path / "failures.csv"
    text = failures_text(store.failures()).encode()
    if not path.exists() or read_limited(path, MOST_TABLE_BYTES) == text:
        return []
    return [f"{path}: not what the parts say; the same extract or import command rewrites it"]


def _plan_fault(store: Store) -> list[str]:
    """A line if the parts hold bags of another plan than store.json's: parts of another store."""
    plan = store.description.provenance["plan"]
    recorded = next((plan[key] for key in PLAN_KEYS if key in plan), None)
    if recorded is None:
        return []
    if plans_digest(zip(store.bag_ids, store.plans(), strict=True)) == recorded:
        return []
    return [f"{store.path}: its parts were planned from other images, boxes or orders of bags"]


def _unchecked(store: Store) -> str:
    version = store.description.schema_version
    return (
        f"this store is of version {version}: the digests of features were compared; names of "
        "images, boxes, orders, and the table of bags have none. Stores that are written now have"
    )


def move_aside(store: Store, parts: Sequence[int], say: Say = lambda line: None) -> list[Path]:
    """Move parts into ``STORE/damaged/``, where nothing reads them; returns their new paths."""
    folder = store.path / ASIDE
    moved = []
    with Claims(store.path / "parts") as claims:
        claims.wait(TABLES, say)
        for number in parts:
            source = store.part_path(number)
            folder.mkdir(exist_ok=True)
            names = (f"{source.stem}.{k}{source.suffix}" for k in itertools.count(1))
            target = next(folder / name for name in names if not (folder / name).exists())
            source.rename(target)
            moved.append(target)
        if moved:
            sync_folder(folder)
            sync_folder(store.path / "parts")
    return moved
