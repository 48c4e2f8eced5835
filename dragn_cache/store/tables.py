"""Tables and leftovers of a store's folder."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dragn_cache.errors import ManifestError, StoreError
from dragn_cache.files import sync_folder, sync_tree
from dragn_cache.manifest import Manifest, read_bags, write_bags
from dragn_cache.manifest.dataset_toml import write_dataset_toml
from dragn_cache.store.claims import living_tokens
from dragn_cache.store.plan import PartPlan

TABLES = "tables"
"""The claim that is held while store.json, manifest/ or failures.csv is written."""
_LOST = "lost"  # the suffix of a scratch folder that is being removed
HALF_WRITTEN = re.compile(r"\.(store\.json|failures\.csv)\..*tmp|\.manifest(\..*)?")


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
                remedy="extract with `update=True`: it finds the bags in the parts",
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
        if HALF_WRITTEN.fullmatch(left.name):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
