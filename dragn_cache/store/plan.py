"""The plan: the bags of each part, decided from the manifest and the limits alone.

Because the plan needs nothing else, a killed run resumes by listing the parts that exist, and two
machines write the same bags into the same part.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dragn_cache.manifest import Instance, Manifest
from dragn_cache.store.config import PART_INSTANCES

PART_BYTES = 128 * 2**20


@dataclass(frozen=True)
class PartPlan:
    """One part: its number, and the bags it holds, by their positions in the manifest."""

    number: int
    bags: tuple[int, ...]

    @property
    def name(self) -> str:
        return part_name(self.number)


def part_name(number: int) -> str:
    """A part's file name without its suffix."""
    return f"{number:05d}"


def is_part_number(text: str) -> bool:
    """Whether a text is a part's number; `str.isdigit` holds of ² too, and `int` has a limit."""
    return re.fullmatch("[0-9]{1,9}", text) is not None


def plan_parts(
    bag_sizes: Sequence[int],
    row_bytes: int,
    part_instances: int = PART_INSTANCES,
    *,
    bags: Sequence[int] | None = None,
    first_number: int = 0,
) -> list[PartPlan]:
    """Cut bags, in order, into parts of whole bags.

    Args:
        bag_sizes: instances of each bag of the manifest.
        row_bytes: bytes of one instance over all taps and views.
        part_instances: the most instances in a part.
        bags: positions of the bags to plan; None is all.
        first_number: number of the first part.

    Returns:
        parts of at most `PART_BYTES` of features and ``part_instances`` instances; a bag that is
        larger than that is a part of its own.
    """
    limit = max(1, min(part_instances, PART_INSTANCES, PART_BYTES // row_bytes))
    parts: list[PartPlan] = []
    part_bags: list[int] = []
    part_rows = 0
    for bag in range(len(bag_sizes)) if bags is None else bags:
        size = bag_sizes[bag]
        if part_rows and part_rows + size > limit:
            parts.append(PartPlan(first_number + len(parts), tuple(part_bags)))
            part_bags, part_rows = [], 0
        part_bags.append(bag)
        part_rows += size
    if part_bags:
        parts.append(PartPlan(first_number + len(parts), tuple(part_bags)))
    return parts


def instances_of(manifest: Manifest, bag: int) -> tuple[Instance, ...]:
    """The instances of the manifest's bag at a position, in order."""
    return manifest.instances.get(manifest.bags[bag].bag_id, ())


def bag_plan(manifest: Manifest, bag: int) -> bytes:
    """sha256 over a bag's instances, as canonical JSON of [[image, order, box], …]."""
    plan = [[row.image, row.order, row.box] for row in instances_of(manifest, bag)]
    text = json.dumps(plan, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).digest()


def bags_digest(part_of_bags: Iterable[tuple[str, int]]) -> str:
    """sha256 (hex) over a table of bags, in order: for each its id as UTF-8, a zero byte, the
    number of its part in decimal, a line feed."""
    lines = (f"{bag_id}\0{part}\n" for bag_id, part in part_of_bags)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest_digest(manifest: Manifest) -> str:
    """sha256 (hex) over all bags in order: for each its id as UTF-8, a zero byte, its plan.

    Labels, splits and groups are left out: they can be replaced without extracting again.
    """
    return plans_digest(
        (row.bag_id, bag_plan(manifest, bag)) for bag, row in enumerate(manifest.bags)
    )


def plans_digest(plans: Iterable[tuple[str, bytes]]) -> str:
    """`manifest_digest` from the ids of all bags and their `bag_plan`."""
    digest = hashlib.sha256()
    for bag_id, plan in plans:
        digest.update(bag_id.encode() + b"\0" + plan)
    return digest.hexdigest()
