"""The tables in a store's folder, and the removal of what dead processes left there."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dragn_cache.checksums import CHECKSUMS, changed_files, write_checksums
from dragn_cache.errors import InputError, StoreError
from dragn_cache.files import (
    MOST_TABLE_BYTES,
    csv_text,
    read_limited,
    sync_folder,
)
from dragn_cache.manifest import Manifest, read_bags, write_bags
from dragn_cache.manifest.dataset_toml import write_dataset_toml
from dragn_cache.store.claims import living_tokens
from dragn_cache.store.part import FAILURE_COLUMNS, Failure
from dragn_cache.store.plan import PartPlan, bags_digest, is_part_number
from dragn_cache.store.schema import StoreDescription

TABLES = "tables"
"""The claim that is held while store.json, manifest/ or failures.csv is written."""
_LOST = "lost"  # the suffix of a scratch folder that is being removed
HALF_WRITTEN = re.compile(r"\.(store\.json|failures\.csv)\..*tmp|\.manifest(\..*)?")


def stored_parts(path: Path, description: StoreDescription, manifest: Manifest) -> list[PartPlan]:
    """The plan as manifest/bags.csv has it: the bags of each part, by their positions.

    Raises:
        StoreError: the table is lost or damaged, or does not have the manifest's bags.
    """
    part_of = part_of_bags(path, description)
    bags_of_part: dict[int, list[int]] = {}
    for k, bag in enumerate(manifest.bags):
        if bag.bag_id not in part_of:
            raise StoreError(
                str(path / "manifest" / "bags.csv"),
                expected="the part of every bag",
                got=f"none for bag {bag.bag_id!r}" if part_of else "none, or a damaged table",
                remedy="extract with `update=True`: it finds the bags in the parts",
            )
        bags_of_part.setdefault(part_of[bag.bag_id], []).append(k)
    return [PartPlan(number, tuple(bags)) for number, bags in sorted(bags_of_part.items())]


def part_of_bags(path: Path, description: StoreDescription) -> dict[str, int]:
    """Bag id → number of its part, from manifest/bags.csv; empty if that is lost or damaged.

    A table of other labels is whole by its plan, which store.json knows; one that an update wrote
    before it was killed, by its bytes.
    """
    folder = path / "manifest"
    try:
        bags, _, _ = read_bags(folder / "bags.csv")
        changed = changed_tables(path)
    except InputError:
        return {}
    cells = [(bag.bag_id, bag.extra.get("part", "")) for bag in bags]
    part_of = {bag_id: int(part) for bag_id, part in cells if is_part_number(part)}
    if description.is_sealed and len(part_of) == len(cells):
        is_planned = bags_digest(part_of.items()) == description.bags
        return part_of if is_planned or changed == [] else {}
    return part_of if not description.is_sealed else {}


def changed_tables(path: Path) -> list[str] | None:
    """Names of tables in ``manifest/`` that are not as they were written; None where that cannot
    be told, as in stores of older versions."""
    folder = path / "manifest"
    if not (folder / CHECKSUMS).exists():
        return None
    return changed_files(folder, ("bags.csv", "dataset.toml"))


def write_tables(path: Path, parts: Sequence[PartPlan], manifest: Manifest) -> None:
    """Write the manifest's tables, or replace them where labels, splits or groups have changed."""
    number_of = {k: part.number for part in parts for k in part.bags}
    folder = path / "manifest"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".manifest.") as scratch:
        added = {"part": [number_of[k] for k in range(len(manifest.bags))]}
        write_dataset_toml(manifest, Path(scratch) / "dataset.toml")
        write_bags(manifest.bags, Path(scratch) / "bags.csv", added=added)
        write_checksums(Path(scratch))
        for new in sorted(Path(scratch).iterdir(), key=lambda new: new.name == CHECKSUMS):
            old = folder / new.name
            if not old.is_file() or read_limited(old, MOST_TABLE_BYTES) != new.read_bytes():
                new.replace(old)
    sync_folder(folder)


def planned_bags(parts: Sequence[PartPlan], manifest: Manifest) -> str:
    """The `bags_digest` of a plan."""
    number_of = {k: part.number for part in parts for k in part.bags}
    return bags_digest((bag.bag_id, number_of[k]) for k, bag in enumerate(manifest.bags))


def failures_text(failures: Sequence[Failure]) -> str:
    """The text of failures.csv."""
    return csv_text(FAILURE_COLUMNS, ([f.bag_id, f.image, f.box, f.reason] for f in failures))


def remove_leftovers(path: Path) -> None:
    """Remove what dead processes have left in a store: claims, scratch, half-written files.

    Only for the holder of the claim `TABLES`: no other process then writes files outside parts/.
    """
    # Folders are listed before the claims are read: one that is made in between has a new claim
    # and must stay.
    folders = [folder for folder in (path / "parts").glob(".?????.*") if folder.is_dir()]
    # A killed removal leaves NAME.lost: it goes before NAME, whose renaming needs that name.
    folders.sort(reverse=True)
    tokens = living_tokens(path / "parts")
    for folder in folders:
        if folder.name.rpartition(".")[2] not in tokens:
            # Renamed before it is emptied: if its holder lives after all (it was suspended), it
            # finds no folder, and cannot complete a part of which some files are gone.
            emptied = folder.with_name(f"{folder.name}.{_LOST}")
            with suppress(OSError):
                folder.rename(emptied)
            shutil.rmtree(emptied, ignore_errors=True)
    for entry in path.iterdir():
        if HALF_WRITTEN.fullmatch(entry.name):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
