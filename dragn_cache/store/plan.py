"""Which bags go into which part: decided from the manifest and the limits alone.

Because the plan needs nothing else, a killed run resumes by listing the parts that exist, and two
machines write the same bags into the same part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PART_BYTES = 128 * 2**20
PART_INSTANCES = 4096


@dataclass(frozen=True)
class PartPlan:
    """One part: its number, and the range of bags (in manifest order) that it holds."""

    number: int
    first_bag: int
    last_bag: int  # exclusive

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def plan_parts(
    bag_sizes: Sequence[int], row_bytes: int, part_instances: int = PART_INSTANCES
) -> list[PartPlan]:
    """Cut the bags, in order, into parts of whole bags.

    Args:
        bag_sizes: instances of each bag, as the manifest has them.
        row_bytes: bytes of one instance over all taps and views.
        part_instances: the most instances in a part.

    Returns:
        parts of at most `PART_BYTES` of features and ``part_instances`` instances; a bag that is
        larger than that is a part of its own.
    """
    limit = max(1, min(part_instances, PART_INSTANCES, PART_BYTES // row_bytes))
    parts: list[PartPlan] = []
    first, filled = 0, 0
    for bag, size in enumerate(bag_sizes):
        if filled and filled + size > limit:
            parts.append(PartPlan(len(parts), first, bag))
            first, filled = bag, 0
        filled += size
    if first < len(bag_sizes):
        parts.append(PartPlan(len(parts), first, len(bag_sizes)))
    return parts
