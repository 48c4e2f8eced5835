"""Bringing a store's plan up to date: bags keep their part, or get a new one at the end.

What an update leaves behind in an old part is no bag's any more: the table of bags names another
part. The plan is changed first, in one step that can be repeated; the new parts are then written as
any others are, so an update that is killed goes on like an extraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dragn_cache.manifest import Manifest
from dragn_cache.store.claims import Claims
from dragn_cache.store.formats import FORMATS
from dragn_cache.store.part import DAMAGE, PartIndex, damaged_part
from dragn_cache.store.plan import PartPlan, instances_of, plan_parts
from dragn_cache.store.schema import (
    StoreDescription,
    read_description,
    require_same_settings,
    write_description,
)
from dragn_cache.store.tables import TABLES, part_of_bags, remove_leftovers, write_tables


@dataclass(frozen=True)
class StoredBag:
    """Where a bag's rows are: in a part's index, at a position among its bags."""

    index: PartIndex
    position: int

    @property
    def plan(self) -> bytes:
        """The `bag_plan` that it was made from."""
        return bytes(self.index.plans[self.position])

    @property
    def digests(self) -> dict[int, bytes]:
        """The image digest of each instance that was used, by its order."""
        first, last = self.index.offsets[self.position : self.position + 2]
        rows = range(int(first), int(last))
        return {int(self.index.order[r]): self.index.image_digests[r].tobytes() for r in rows}


@dataclass(frozen=True)
class UpdateReport:
    """What an update found, by bag id.

    Attributes:
        changed: their images, boxes or files are not those they were made from.
        new: not in the store so far; ``removed``: no longer in the manifest.
        waiting: planned earlier and not written yet.
        kept: up to date.
    """

    changed: tuple[str, ...]
    new: tuple[str, ...]
    removed: tuple[str, ...]
    waiting: tuple[str, ...]
    kept: int


IsCurrent = Callable[[int, StoredBag], bool]
"""Whether the manifest's bag at a position still is what a stored bag was made from."""


def replan(
    path: Path,
    wanted: StoreDescription,
    manifest: Manifest,
    is_current: IsCurrent,
    part_instances: int,
) -> UpdateReport:
    """Change a store's plan to a manifest's present state; computes and writes no features.

    Raises:
        StoreMismatchError: the store's features or numerics are others.
        DamagedPartError: a part's index cannot be read.
    """
    with Claims(path / "parts") as claims:
        claims.wait(TABLES)
        remove_leftovers(path)
        have = read_description(path)
        planned = {**wanted.provenance, "plan": have.provenance["plan"]}
        require_same_settings(path, have, replace(wanted, provenance=planned))
        stored = stored_bags(path, have)
        places = part_of_bags(path)
        known = places or dict.fromkeys(stored, 0)
        found: dict[str, list[str]] = {"changed": [], "new": [], "waiting": []}
        numbers: dict[int, list[int]] = {}
        todo: list[int] = []
        for k, bag in enumerate(manifest.bags):
            number = places.get(bag.bag_id, -1)
            if bag.bag_id in stored and is_current(k, stored[bag.bag_id][1]):
                numbers.setdefault(stored[bag.bag_id][0], []).append(k)
            elif number >= 0 and not _part_path(path, have, number).exists():
                numbers.setdefault(number, []).append(k)
                found["waiting"].append(bag.bag_id)
            else:
                todo.append(k)
                found["changed" if bag.bag_id in known else "new"].append(bag.bag_id)
        sizes = [len(instances_of(manifest, k)) for k in range(len(manifest.bags))]
        first = 1 + max([*numbers, *_numbers(path, have)], default=-1)
        parts = [PartPlan(n, tuple(bags)) for n, bags in sorted(numbers.items())]
        parts += plan_parts(sizes, have.row_bytes, part_instances, bags=todo, first_number=first)
        ids = {bag.bag_id for bag in manifest.bags}
        removed = tuple(bag_id for bag_id in known if bag_id not in ids)
        # The table first: until store.json says so too, only another update goes on from here.
        write_tables(path, parts, manifest)
        plan = wanted.provenance["plan"]
        if todo or removed or plan != have.provenance["plan"]:
            revised = {**have.provenance, "plan": plan}
            write_description(replace(have, provenance=revised, revision=have.revision + 1), path)
    return UpdateReport(
        changed=tuple(found["changed"]),
        new=tuple(found["new"]),
        removed=removed,
        waiting=tuple(found["waiting"]),
        kept=len(manifest.bags) - len(todo) - len(found["waiting"]),
    )


def stored_bags(path: Path, description: StoreDescription) -> dict[str, tuple[int, StoredBag]]:
    """Every bag that some part holds, with the newest part that holds it."""
    found: dict[str, tuple[int, StoredBag]] = {}
    for number in _numbers(path, description):
        part = _part_path(path, description, number)
        try:
            index = FORMATS[description.format].read_index(part)
        except DAMAGE as error:
            raise damaged_part(part, error) from error
        for position, bag_id in enumerate(index.ids):
            found[bag_id] = (number, StoredBag(index, position))
    return found


def _numbers(path: Path, description: StoreDescription) -> list[int]:
    """Numbers of the parts that exist, rising."""
    suffix = FORMATS[description.format].suffix
    names = [p.name.removesuffix(suffix) for p in (path / "parts").glob(f"*{suffix}")]
    return sorted(int(name) for name in names if name.isdigit())


def _part_path(path: Path, description: StoreDescription, number: int) -> Path:
    return path / "parts" / f"{number:05d}{FORMATS[description.format].suffix}"
