"""What a recursion does to a batch: which rows meet in which round, and by what unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Round(NamedTuple):
    """One round of a recursion over a batch: int64 tables on the host."""

    done: Tensor  # (b,) bags that leave before it
    ends: Tensor  # (b, 2) the two rows, perhaps one twice, whose mean is a bag's result
    members: Tensor  # (W, k) the rows of each window
    turns: Tensor  # (W,) when a loop over bags, rounds, windows would come to each window; or empty
    first: int = 0  # the row of the first result, where results are further rows


def plan_rounds(sizes: Tensor) -> Iterator[Round]:
    """Which rows meet in DRAGN's rounds, for bags of ``sizes`` (B,) instances, each at least one.

    The rows of a round are the windows of the round before; those of the first are the instances.
    A window is three rows side by side. A bag of one or two rows leaves.
    """
    bag, left = torch.arange(len(sizes)), sizes
    calls = (sizes - 1) ** 2 // 4  # unit calls of a whole bag: (n-2) + (n-4) + ...
    calls_before = calls.cumsum(0) - calls
    number = 0
    while len(left):
        first = left.cumsum(0) - left
        stays = left > 2
        ends = torch.stack((first, first + left - 1), dim=1)[~stays]
        done, bag, windows = bag[~stays], bag[stays], left[stays] - 2
        owner = torch.repeat_interleave(windows)
        place = torch.arange(len(owner)) - (windows.cumsum(0) - windows)[owner]
        # n-2, n-4, ... windows of this bag came in the rounds before: number * (n-1-number).
        turn = calls_before[bag] + number * (sizes[bag] - 1 - number)
        members = (first[stays][owner] + place)[:, None] + torch.arange(3)
        yield Round(done, ends, members, turn[owner] + place)
        left = windows
        number += 1


class Moments(NamedTuple):
    """What one BN layer saw in one round, over G groups (1, or the windows), K channels of BN."""

    layer: int
    round: int
    values: int  # how many a group and channel had
    mean: Tensor  # (G, K)
    variance: Tensor  # (G, K), unbiased


@dataclass
class Plan:
    """What a pass does, apart from its numbers.

    Attributes:
        inputs: maps of a window, and hidden maps of a unit.
        orders: so many windows one after the other share a result: the mean of theirs.
        grows: whether a round's results are further rows of the same array, from its ``first`` on;
            if not, they are the rows of the next round.
    """

    rounds: Sequence[Round]
    units: int  # one for each of the first rounds; the last serves the rest
    dtype: torch.dtype
    channels: int
    inputs: int
    layers: int
    kernel: int
    shared: bool  # one kernel for all channels
    batch_norm: bool  # with statistics of this batch
    by_window: bool
    eps: float
    orders: int = 1
    grows: bool = False
    moments: list[Moments] = field(default_factory=list)

    def unit(self, number: int) -> int:
        """Which unit folds round ``number``."""
        return min(number, self.units - 1)
