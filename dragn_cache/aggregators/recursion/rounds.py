"""The plan of a recursion over a batch: the windows of each round, and the unit that folds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Round(NamedTuple):
    """One round of a recursion over a batch: int64 tables on the host."""

    finished: Tensor  # (b,) bags that leave before it
    last_rows: Tensor  # (b, 2) the two rows, perhaps one twice, whose mean is a bag's result
    members: Tensor  # (W, k) the rows of each window
    loop_index: Tensor  # (W,) a window's number in a loop over bags, rounds, windows; or empty
    first_result: int = 0  # the row of the first result, where results are further rows


class Schedule(NamedTuple):
    """The rounds of a recursion over a batch, and where their results lie."""

    rounds: Sequence[Round]
    orders: int = 1  # so many neighbouring windows share a result, the mean of theirs
    one_array: bool = False  # results are further rows of it; if not, the rows of the next round


def plan_rounds(sizes: Tensor) -> Iterator[Round]:
    """DRAGN's rounds, for bags of ``sizes`` (B,) instances, each at least one.

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
        last_rows = torch.stack((first, first + left - 1), dim=1)[~stays]
        finished, bag, windows = bag[~stays], bag[stays], left[stays] - 2
        owner = torch.repeat_interleave(windows)
        place = torch.arange(len(owner)) - (windows.cumsum(0) - windows)[owner]
        # The rounds before had n-2, n-4, ... windows of this bag: number * (n-1-number).
        first_index = calls_before[bag] + number * (sizes[bag] - 1 - number)
        members = (first[stays][owner] + place)[:, None] + torch.arange(3)
        yield Round(finished, last_rows, members, first_index[owner] + place)
        left = windows
        number += 1


class Moments(NamedTuple):
    """Statistics of one BN layer in one round: G groups (1, or the windows), K channels of BN."""

    layer: int
    round: int
    mean: Tensor  # (G, K)
    variance: Tensor  # (G, K), unbiased


@dataclass
class Plan:
    """The shapes and options of one pass, and the statistics that it takes."""

    schedule: Schedule
    units: int  # one for each of the first rounds; the last serves the rest
    dtype: torch.dtype
    channels: int
    inputs: int  # maps of a window, and hidden maps of a unit
    layers: int  # convolutions of a unit
    kernel: int  # side in pixels
    shared: bool  # one kernel for all channels
    batch_norm: bool  # with statistics of this batch
    by_window: bool  # statistics for each window
    eps: float
    moments: list[Moments] = field(default_factory=list)

    @property
    def rounds(self) -> Sequence[Round]:
        return self.schedule.rounds

    @property
    def orders(self) -> int:
        return self.schedule.orders

    @property
    def one_array(self) -> bool:
        return self.schedule.one_array

    def unit_of_round(self, number: int) -> int:
        """The number of the unit that folds round ``number``."""
        return min(number, self.units - 1)
