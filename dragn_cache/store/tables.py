"""The tables in a store's folder, and the removal of what dead processes left there."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dragn_cache.errors import ManifestError, StoreError
from dragn_cache.files import file_sha256, sync_folder, sync_tree
from dragn_cache.manifest import Manifest, read_bags, write_bags
from dragn_cache.manifest.dataset_toml import write_dataset_toml
from dragn_cache.store.claims import living_tokens
from dragn_cache.store.plan import PartPlan, is_part_number

TABLES = "tables"
"""The claim that is held while store.json, manifest/ or failures.csv is written."""
_LOST = "lost"  # the suffix of a scratch folder that is being removed
HALF_WRITTEN = re.compile(r"\.(store\.json|failures\.csv)\..*tmp|\.manifest(\..*)?")


def stored_parts(path: Path, manifest: Manifest) -> list[PartPlan]:
    """The plan as manifest/bags.csv has it: the bags of each part, by their positions.

    Raises:
        StoreError: the table is lost, or does not have the manifest's bags.
    """
    part_of = part_of_bags(path)
    bags_of_part: dict[int, list[int]] = {}
    for k, bag in enumerate(manifest.bags):
        if bag.bag_id not in part_of:
            raise StoreError(
                str(path / "manifest" / "bags.csv"),
                expected="the part of every bag",
                got=f"none for bag {bag.bag_id!r}",
                remedy="extract with `update=True`: it finds the bags in the parts",
            )
        bags_of_part.setdefault(part_of[bag.bag_id], []).append(k)
    return [PartPlan(number, tuple(bags)) for number, bags in sorted(bags_of_part.items())]


def part_of_bags(path: Path) -> dict[str, int]:
    """Bag id → number of its part, from manifest/bags.csv; empty if that cannot be read."""
    try:
        bags, _, _ = read_bags(path / "manifest" / "bags.csv")
    except ManifestError:
        return {}
    cells = {bag.bag_id: bag.extra.get("part", "") for bag in bags}
    return {bag_id: int(part) for bag_id, part in cells.items() if is_part_number(part)}


def write_tables(path: Path, parts: Sequence[PartPlan], manifest: Manifest) -> None:
    """Write the manifest's tables, or replace them where labels, splits or groups have changed."""
    number_of = {k: part.number for part in parts for k in part.bags}
    folder = path / "manifest"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".manifest.") as scratch:
        added = {"part": [number_of[k] for k in range(len(manifest.bags))]}
        write_dataset_toml(manifest, Path(scratch) / "dataset.toml")
        write_bags(manifest.bags, Path(scratch) / "bags.csv", added=added)
        for new in Path(scratch).iterdir():
            old = folder / new.name
            if (
                not old.is_file()
                or old.stat().st_size != new.stat().st_size
                or file_sha256(old) != file_sha256(new)
            ):
                sync_tree(new)
                new.replace(old)
    sync_folder(folder)


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
