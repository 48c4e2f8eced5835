"""Memory and time that a method needs for the longest bags, said before it starts.

Each method knows what a bag of n instances takes (`Aggregator.needed_bytes`,
`ClassicalMethod.row_values`); here that is compared with what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dragn_cache.aggregators.base import Aggregator
from dragn_cache.devices import CPU, free_bytes
from dragn_cache.errors import InputError
from dragn_cache.loading.feeds import EVALUATION_ROWS
from dragn_cache.loading.stored import StoredBags
from dragn_cache.ragged import RaggedBags
from dragn_cache.types import Warn

LONG_SECONDS = 60.0  # of a step: below it nothing is said about time


def require_room_to_train(
    aggregator: Aggregator,
    sizes: Tensor,
    batch_size: int,
    *,
    free: float,
    jobs: int = 1,
    warn: Warn = lambda text: None,
) -> None:
    """Raise `InputError` unless a training step with the longest bag fits into memory.

    Args:
        sizes: (B,) instances of the bags that are trained on.
        batch_size: bags of a step. One longest bag and others of mean size must fit;
            of a batch of the longest ones ``warn`` is told if it does not.
        free: bytes, for so many ``jobs`` together.
        warn: is also told how long a step takes where that is long.
    """
    ordered = sizes.sort(descending=True).values
    longest, others = int(ordered[0]), max(1, len(sizes) - 1)
    mean = max(1, round((int(sizes.sum()) - longest) / others))

    def needed(bags: int) -> int:
        return aggregator.needed_bytes([longest, *[mean] * (bags - 1)], training=True)

    bags = min(batch_size, len(sizes))
    ways = ["give `jobs=1`"] if jobs > 1 and needed(bags) <= free else []
    free /= jobs
    _require(aggregator, needed, longest, bags, free, "a training step with", ways)
    most = aggregator.needed_bytes(ordered[:bags].tolist(), training=True)
    if most > free:
        warn(
            f"a step with the {bags} longest bags would need about {_gigabytes(most)} of memory, "
            f"and {_gigabytes(free)} are free: a smaller `batch_size` is safer"
        )
    seconds = aggregator.quadratic_seconds(longest)
    if seconds > LONG_SECONDS:
        warn(
            f"{aggregator.name} takes time with the square of a bag's instances: about "
            f"{_duration(seconds)} on one core for a training step with the longest, of {longest:,}"
        )


def require_room_to_predict(aggregator: Aggregator, sizes: Tensor, *, free: float) -> None:
    """Raise `InputError` unless the longest of some bags fits into memory without gradients.

    Args:
        sizes: (B,) instances of the bags.
        free: bytes.
    """
    longest = int(sizes.max())
    others = min(int(sizes.sum()) - longest, EVALUATION_ROWS)

    def needed(bags: int) -> int:
        # Other bags come with it as long as there are few rows: as one, which is the most.
        return aggregator.needed_bytes([longest, *[others] * (others > 0)], training=False)

    _require(aggregator, needed, longest, 1, free, "predicting")


def free_for_model(bags: RaggedBags | StoredBags, device: torch.device = CPU) -> float:
    """Free bytes, less those that are reserved for reading bags."""
    reserved = bags.budget if isinstance(bags, StoredBags) else 0
    return max(0, free_bytes(device) - reserved)


def _require(
    aggregator: Aggregator,
    needed: Callable[[int], int],
    longest: int,
    bags: int,
    free: float,
    what: str,
    ways: Sequence[str] = (),
) -> None:
    if needed(bags) <= free:
        return
    fewer = next((b for b in _halves(bags) if needed(b) <= free), None)
    ways = [*ways, *([f"give `batch_size={fewer}`"] if fewer else [])]
    if aggregator.need.less:
        ways.append(f"give it {aggregator.need.less}")
    if aggregator.name not in LEAST:
        ways.append(f"choose a method of less need, as {' or '.join(LEAST)}")
    ways.append("cut the bag into several, or free memory")
    others = f" and {bags - 1} others" if bags > 1 else ""
    raise InputError(
        f"aggregator {aggregator.name}",
        expected=f"about {_gigabytes(needed(bags))} of memory for {what} the longest bag, of "
        f"{longest:,} instances{others}",
        got=f"{_gigabytes(free)} that are free",
        remedy="; or ".join(ways),
    )


LEAST: Sequence[str] = ("abmil", "mean")


def _halves(bags: int) -> list[int]:
    """Half of the bags, a quarter, and so on to 1."""
    return [bags >> k for k in range(1, bags.bit_length())]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds > 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds / 60:,.0f} minutes"
