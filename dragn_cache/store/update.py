"""Bringing a store's plan up to date: bags keep their part, or get a new one at the end.

The rows of a changed bag stay in its old part, where nothing reads them: the table of bags names
the new part. The plan is changed first, in one step that can be repeated; the new parts are then
written like any others, so an update that was killed is continued like an extraction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dragn_cache.manifest import Manifest
from dragn_cache.store.claims import Claims
from dragn_cache.store.formats import FORMATS
from dragn_cache.store.part import PartIndex, reading_part, require_sealed
from dragn_cache.store.plan import PartPlan, instances_of, is_part_number, plan_parts
from dragn_cache.store.schema import (
    StoreDescription,
    read_description,
    require_same_settings,
    write_description,
)
from dragn_cache.store.tables import (
    TABLES,
    part_of_bags,
    planned_bags,
    remove_leftovers,
    write_tables,
)
from dragn_cache.types import Say


@dataclass(frozen=True)
class StoredBag:
    """The place of a bag's rows: a part's index, and a position among its bags."""

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
    """The result of an update: ids of bags.

    Attributes:
        changed: bags whose images, boxes or files have changed.
        new: bags that were not in the store; ``removed``: bags that left the manifest.
        waiting: bags that were planned earlier and are not written yet.
        kept: the number of bags that are up to date.
    """

    changed: tuple[str, ...]
    new: tuple[str, ...]
    removed: tuple[str, ...]
    waiting: tuple[str, ...]
    kept: int


IsCurrent = Callable[[int, StoredBag], bool]
"""Whether the manifest's bag at a position has the images, boxes and files that were stored."""


def replan(
    path: Path,
    description: StoreDescription,
    manifest: Manifest,
    is_current: IsCurrent,
    part_instances: int,
    say: Say = lambda line: None,
) -> UpdateReport:
    """Change a store's plan to a manifest's present state; computes and writes no features.

    Raises:
        StoreMismatchError: the store's features or numerics are others.
        DamagedPartError: a part's index cannot be read.
    """
    with Claims(path / "parts") as claims:
        claims.wait(TABLES, say)
        remove_leftovers(path)
        have = read_description(path)
        planned = {**description.provenance, "plan": have.provenance["plan"]}
        require_same_settings(path, have, replace(description, provenance=planned))
        stored = stored_bags(path, have)
        part_of = part_of_bags(path, have)
        # Where the table is lost, the parts tell which bags the store had.
        known = part_of or dict.fromkeys(stored, 0)
        by_state: dict[str, list[str]] = {"changed": [], "new": [], "waiting": []}
        bags_of_part: dict[int, list[int]] = {}
        to_write: list[int] = []
        for k, bag in enumerate(manifest.bags):
            number = part_of.get(bag.bag_id, -1)
            if bag.bag_id in stored and is_current(k, stored[bag.bag_id][1]):
                bags_of_part.setdefault(stored[bag.bag_id][0], []).append(k)
            elif number >= 0 and not _part_path(path, have, number).exists():
                bags_of_part.setdefault(number, []).append(k)
                by_state["waiting"].append(bag.bag_id)
            else:
                to_write.append(k)
                by_state["changed" if bag.bag_id in known else "new"].append(bag.bag_id)
        sizes = [len(instances_of(manifest, k)) for k in range(len(manifest.bags))]
        next_number = 1 + max([*bags_of_part, *_numbers(path, have)], default=-1)
        parts = [PartPlan(n, tuple(bags)) for n, bags in sorted(bags_of_part.items())]
        parts += plan_parts(
            sizes, have.row_bytes, part_instances, bags=to_write, first_number=next_number
        )
        ids = {bag.bag_id for bag in manifest.bags}
        removed = tuple(bag_id for bag_id in known if bag_id not in ids)
        # The table is written before store.json: after a kill in between, extract still refuses the
        # store as one of another plan, and a second update makes both agree.
        write_tables(path, parts, manifest)
        plan = description.provenance["plan"]
        bags = planned_bags(parts, manifest) if have.is_sealed else ""
        if to_write or removed or plan != have.provenance["plan"] or bags != have.bags:
            revised = {**have.provenance, "plan": plan}
            have = replace(have, provenance=revised, bags=bags, revision=have.revision + 1)
            write_description(have, path)
    return UpdateReport(
        changed=tuple(by_state["changed"]),
        new=tuple(by_state["new"]),
        removed=removed,
        waiting=tuple(by_state["waiting"]),
        kept=len(manifest.bags) - len(to_write) - len(by_state["waiting"]),
    )


def stored_bags(path: Path, description: StoreDescription) -> dict[str, tuple[int, StoredBag]]:
    """Every bag that some part holds, with the newest part that holds it."""
    bags: dict[str, tuple[int, StoredBag]] = {}
    for number in _numbers(path, description):
        part = _part_path(path, description, number)
        with reading_part(part):
            index = FORMATS[description.format].read_index(part)
            require_sealed(index, description)
        for position, bag_id in enumerate(index.ids):
            bags[bag_id] = (number, StoredBag(index, position))
    return bags


def _numbers(path: Path, description: StoreDescription) -> list[int]:
    """Numbers of the parts that exist, rising."""
    suffix = FORMATS[description.format].suffix
    names = [p.name.removesuffix(suffix) for p in (path / "parts").glob(f"*{suffix}")]
    return sorted(int(name) for name in names if is_part_number(name))


def _part_path(path: Path, description: StoreDescription, number: int) -> Path:
    return path / "parts" / f"{number:05d}{FORMATS[description.format].suffix}"
