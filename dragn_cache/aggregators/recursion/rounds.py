"""The plan of a recursion over a batch: the windows of each round, and the unit that folds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
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
    windows: Sequence[int]  # of each round
    orders: int = 1  # so many neighbouring windows share a result, the mean of theirs
    one_array: bool = False  # results are further rows of it; if not, the rows of the next round


class DragnRounds(Sequence[Round]):
    """DRAGN's rounds, for bags of ``sizes`` (B,) instances, each at least one.

    The rows of a round are the windows of the round before; those of the first are the instances.
    A window is three rows side by side. A bag of one or two rows leaves. Rounds are made when they
    are asked for: those of a bag of n instances have n² / 4 windows.
    """

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = sizes
        self.calls = (sizes - 1) ** 2 // 4  # unit calls of a whole bag: (n-2) + (n-4) + ...
        self.calls_before = self.calls.cumsum(0) - self.calls
        self.total = (int(sizes.max()) - 1) // 2 + 1

    def __len__(self) -> int:
        return self.total

    @property
    def windows(self) -> list[int]:
        """The number of windows of each round."""
        number = torch.arange(self.total)
        ordered = self.sizes.sort().values
        # Of the bags longer than 2 (number + 1), the sum of what is longer.
        first = torch.searchsorted(ordered, 2 * (number + 1), right=True)
        above = F.pad(ordered.flip(0).cumsum(0).flip(0), (0, 1))[first]
        counts: list[int] = (above - (len(ordered) - first) * 2 * (number + 1)).tolist()
        return counts

    @overload
    def __getitem__(self, number: int) -> Round: ...
    @overload
    def __getitem__(self, number: slice) -> list[Round]: ...
    def __getitem__(self, number: int | slice) -> Round | list[Round]:
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(self.total))]
        if not 0 <= number < self.total:
            raise IndexError(number)
        bag = (self.sizes > 2 * number).nonzero().flatten()
        left = self.sizes[bag] - 2 * number
        first = left.cumsum(0) - left
        stays = left > 2
        last_rows = torch.stack((first, first + left - 1), dim=1)[~stays]
        finished, bag, windows = bag[~stays], bag[stays], left[stays] - 2
        owner = torch.repeat_interleave(windows)
        place = torch.arange(len(owner)) - (windows.cumsum(0) - windows)[owner]
        # The rounds before had n-2, n-4, ... windows of this bag: number * (n-1-number).
        first_index = self.calls_before[bag] + number * (self.sizes[bag] - 1 - number)
        members = (first[stays][owner] + place)[:, None] + torch.arange(3)
        return Round(finished, last_rows, members, first_index[owner] + place)


KEPT_WINDOWS = 2**22  # of rounds that are made once and kept


def plan_rounds(sizes: Tensor) -> Schedule:
    """`DragnRounds` as a schedule; few are kept, so that each is made once."""
    rounds = DragnRounds(sizes)
    windows = rounds.windows
    return Schedule(list(rounds) if sum(windows) <= KEPT_WINDOWS else rounds, windows)


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
    def windows(self) -> Sequence[int]:
        return self.schedule.windows

    @property
    def orders(self) -> int:
        return self.schedule.orders

    @property
    def one_array(self) -> bool:
        return self.schedule.one_array

    def unit_of_round(self, number: int) -> int:
        """The number of the unit that folds round ``number``."""
        return min(number, self.units - 1)
