"""DRAGN: a small convolution folds each three neighbouring instances into one, again and again.

"DRAGN: Deep Recursively AggreGation Network", Algorithm 1: while a bag has more than two
instances, ``o <- [u(o_j, o_j+1, o_j+2) for j = 1..n-2]``; then one instance is the result, and
of two the mean. Global average pooling comes after the recursion, so the features are maps.

- **One pass for the whole batch.** In each round the unit is called once, on all windows of all
  bags that still have more than two rows: no padding, no loop over windows or bags.
  ``plan_rounds`` finds the windows' rows from the bag sizes alone. A bag of two rows or one is
  pooled to a vector and leaves, so that a round has the rows of its windows only. A bag of n
  instances has n² / 4 windows, and takes time for them.
- **Three ways, one result.** L1Agg with one unit for all rounds is linear: its recursion and the
  pooling after it are one weighted sum (`linear`), without any window. The other units, and L1Agg
  with a kernel per channel, run in C++ on a CPU with a compiler (`compiled`). Without it, on a GPU
  and for ``full``, the other units' own layers are called, round by round, here.
- **The order** (``order``) is the caller's, or that of the leaves of HAMIL's tree, which does not
  depend on the caller's, or the embedding is the mean over seeded permutations of each bag (see
  `orders`). Features are put in order once, before the recursion; where L1Agg is one weighted sum,
  its weights are instead.
- **Short and long bags** (``short``, ``cap``): one or two instances are taken as they are, or
  repeated to three; of very many, some may be taken, evenly spaced in the order above.
- **The unit** has windows as a batch of M maps, the three instances as channels. ``mixing``:
  ``shared``, one kernel for all feature channels, M = windows x C, (M, 3, h, w) -> (M, 1, h, w);
  ``per_channel``, a kernel of its own for each feature channel, and ``full``, all channels into
  all, both M = windows, (M, 3C, h, w) -> (M, C, h, w). There, input channel ``3 c + k`` is
  feature channel c of the window's instance k: the three instances of channel 0 come first.
- **The start** (``init``): "mean" starts as the recursive mean, exactly so without BN on
  non-negative features; "default" is PyTorch's, which can explode on long bags.
- **Batch normalisation** is off unless asked for, as in the authors' code. ``bn_scope="round"``: in
  training, statistics over all values of one BN channel in a round (all windows of all bags, h and
  w; with ``shared`` the C feature channels as well); in evaluation, running statistics of each
  round by itself, since folding makes values less spread from round to round (see `UnitNorm`).
  ``"window"``: as in a loop that calls the unit on one window at a time, the paper's words: each
  window is normalised by its own statistics, and one set of running statistics moves once per
  window, bag by bag, round by round, window by window. Evaluation then normalises all rounds by
  statistics that are no round's, and gives other results than training did: it is there to
  reproduce the reference. Variances are unbiased in running statistics, as in PyTorch. Where a
  channel has one value in a window (vectors, unless ``shared``; C = 1), a round of one window has
  no statistics: no BN there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import DragnOptions
from dragn_cache.aggregators.recursion import compiled
from dragn_cache.aggregators.recursion.linear import pool_linearly, table_values
from dragn_cache.aggregators.recursion.orders import (
    clustered_orders,
    permuted_orders,
    reordered,
    resized,
)
from dragn_cache.aggregators.recursion.rounds import KEPT_WINDOWS, DragnRounds, Round, plan_rounds
from dragn_cache.aggregators.recursion.tree import tree_values
from dragn_cache.aggregators.recursion.units import (
    CONVOLUTIONS,
    DragnUnit,
    NormPass,
    UnitConv,
)
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags

PERMUTATIONS = 8
KEPT = (1, None)  # fewest and most instances of a bag that the recursion is given


class Dragn(Aggregator, declared="dragn"):
    """Embedding (B, C): global average pooling of the recursion's result. No attention.

    Args:
        in_shape: (C, h, w), or (C,) for vectors, which are maps of one pixel (then only the
            kernel's centre works).
        options: `DragnOptions`.

    Attributes:
        units: the units by round, each a module (M, 3, h, w) -> (M, 1, h, w) (see ``mixing``);
            ``unit`` is the first, and the only one when rounds share it.

    Raises:
        InputError: an option that is not allowed, or BN for windows of one value.
    """

    options: DragnOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        chosen = self.options
        channels, values = self.in_shape[0], math.prod(self.in_shape[1:])
        single = (values * channels if chosen.mixing == "shared" else values) == 1
        if chosen.bn == "on" and single:
            raise InputError(
                "aggregator dragn, option bn",
                expected="off or auto, as a window is one value",
                got="'on'",
                remedy="leave it out",
            )
        has_bn = chosen.bn == "on" or (chosen.bn == "auto" and not single)
        self._sizes = (1 if chosen.short == "kept" else 3, chosen.cap)
        self._order = chosen.order
        # A tree does not tell which of two instances is the first to be repeated.
        self.order_sensitive = chosen.order != "clustered" or chosen.short == "repeated"
        self.bn_scope = chosen.bn_scope
        self._mixing = chosen.mixing
        self._linear = chosen.unit == "L1Agg" and chosen.share_rounds and chosen.mixing != "full"
        self.units = nn.ModuleList(
            DragnUnit(
                CONVOLUTIONS[chosen.unit],
                channels=1 if chosen.mixing == "shared" else channels,
                groups=channels if chosen.mixing == "per_channel" else 1,
                kernel=chosen.kernel,
                bn=chosen.bn_scope if has_bn else None,
                init=chosen.init,
            )
            for _ in range(chosen.rounds or 1)
        )

    @property
    def unit(self) -> DragnUnit:
        """The unit of the first round."""
        return cast(DragnUnit, self.units[0])

    @property
    def stackable(self) -> bool:
        # A tree is grown on the host.
        plain = self._sizes == KEPT and self._order != "clustered"
        return self._linear and self._mixing == "shared" and plain

    def needed_bytes(self, sizes: Sequence[int], *, training: bool) -> int:
        """Those of the features, of the trees of ``order=clustered`` and of the recursion."""
        orders = 1
        if self._order == "permuted":
            orders = self.options.permutations or PERMUTATIONS
        fewest, most = self._sizes
        taken = [min(max(n, fewest), most or n) for n in sizes] * orders
        rows = sum(sizes) + (sum(taken) if taken != list(sizes) else 0)
        values: float = 2 * math.prod(self.in_shape) * rows
        if self._order == "clustered":
            values += sum(map(tree_values, sizes))
        return int(values * self.dtype.itemsize) + self._recursion_bytes(taken, training)

    def _recursion_bytes(self, sizes: Sequence[int], training: bool) -> int:
        channels, size = self.in_shape[0], self.dtype.itemsize
        pixels, stages = math.prod(self.in_shape[1:]), len(self.unit.convolutions) - 1
        vectors = len(self.in_shape) == 1
        in_cpp = self._mixing != "full" and compiled.applies(
            self._all_units(), self._anchor.device, vectors=vectors
        )
        if self._linear and not (self._mixing == "per_channel" and in_cpp):
            groups = 1 if self._mixing == "shared" else channels
            return int(size * groups * table_values(max(sizes), pixels, groups, training=training))
        windows = DragnRounds(torch.tensor(sizes)).windows
        tables = 32 * (sum(windows) if sum(windows) <= KEPT_WINDOWS else 2 * max(windows))
        if training and self.bn_scope == "window":  # statistics of each window
            tables += 3 * size * stages * sum(windows) * 3 * (channels + 16)
        if in_cpp:
            return tables + compiled.needed_bytes(
                self._all_units(), windows, self.in_shape, training=training
            )
        maps = (sum(windows) if training else max(windows)) * channels * pixels * size
        return tables + maps * (5 + 9 * stages)

    def quadratic_seconds(self, n: int) -> float:
        # Measured: 5e-8 for the weights of each pixel of a window; where the windows are folded,
        # 1e-8 for each value, and 3e-8 for each hidden convolution.
        n, pixels = min(n, self._sizes[1] or n), math.prod(self.in_shape[1:])
        if self._linear and self._mixing == "shared":
            return 5e-8 * n**2 * pixels
        orders = self.options.permutations or PERMUTATIONS if self._order == "permuted" else 1
        stages = len(self.unit.convolutions) - 1
        return (1e-8 + 3e-8 * stages) * orders * n**2 / 4 * math.prod(self.in_shape)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        orders = self._orders(bags)
        if orders is None:
            return Aggregated(self._fold_all(resized(bags, *self._sizes)), None)
        if self._linear and self._mixing == "shared" and self._sizes == KEPT:
            return Aggregated(self._pool_linearly(bags, orders), None)
        pooled = self._fold_all(resized(reordered(bags, orders), *self._sizes))
        return Aggregated(pooled.view(len(orders), len(bags), -1).mean(0), None)

    def _orders(self, bags: RaggedBags) -> Tensor | None:
        """(K, N), as `orders` makes them; None is as the rows come."""
        if self._order == "given":
            return None
        if self._order == "clustered":
            return clustered_orders(bags)
        return permuted_orders(bags.offsets, self.options.permutations or PERMUTATIONS)

    def _pool_linearly(self, bags: RaggedBags, orders: Tensor | None = None) -> Tensor:
        """(B, C) by `linear`."""
        conv = cast(UnitConv, self.unit[0])
        return pool_linearly(bags, conv.weight, cast(Tensor, conv.bias), orders)

    def _fold_all(self, bags: RaggedBags) -> Tensor:
        """(B, C): the recursion on bags in their order, by the fastest way for them."""
        if self._linear and not (self._mixing == "per_channel" and self._compiled(bags)):
            return self._pool_linearly(bags)
        schedule = plan_rounds(bags.offsets.diff())
        norms = NormPass(self.bn_scope)
        if self._compiled(bags):
            shared = self._mixing == "shared"
            pooled = compiled.fold(bags, self._all_units(), schedule, norms, shared=shared)
        else:
            pooled = self._fold_by_library(bags, schedule.rounds, norms)
        norms.finish()
        return pooled

    def _compiled(self, bags: RaggedBags) -> bool:
        """Whether the recursion in C++ applies; it has no mixing ``full``."""
        return self._mixing != "full" and compiled.applies(
            self._all_units(), bags.values.device, vectors=bags.values.dim() == 2
        )

    def _all_units(self) -> list[DragnUnit]:
        return [cast(DragnUnit, unit) for unit in self.units]

    def _fold_by_library(
        self, bags: RaggedBags, rounds: Sequence[Round], norms: NormPass
    ) -> Tensor:
        """(B, C) by PyTorch: one call of the unit for all windows of a round."""
        maps = self.maps(bags)
        pooled: list[Tensor] = []
        finished: list[Tensor] = []
        for number, step in enumerate(rounds):
            if len(step.finished):
                finished.append(step.finished)
                pooled.append(_pool_last(maps, step.last_rows))
            if len(step.members):
                norms.start_round(number, step.loop_index)
                maps = self._fold(maps, step.members, number, norms)
        order = torch.cat(finished).argsort().to(maps.device)
        return torch.cat(pooled).index_select(0, order)

    def _fold(self, maps: Tensor, members: Tensor, number: int, norms: NormPass) -> Tensor:
        """One round: (rows, C, h, w) -> (W, C, h, w), one map per window."""
        rows = members.T.to(maps.device)
        # Side by side in dimension 2, the three instances are the input channels for all mixings.
        windows = torch.stack([maps.index_select(0, row) for row in rows], dim=2)
        count, channels, _, height, width = windows.shape
        batch = count * channels if self._mixing == "shared" else count
        unit = self.units[min(number, len(self.units) - 1)]
        folded: Tensor = unit(windows.reshape(batch, -1, height, width), norms)
        return folded.reshape(count, channels, height, width)


def _pool_last(maps: Tensor, rows: Tensor) -> Tensor:
    """(b, C): the mean of a finished bag's two last maps, ``rows`` (b, 2), averaged over pixels."""
    last = maps.index_select(0, rows.flatten().to(maps.device))
    return last.mean((2, 3)).reshape(len(rows), 2, -1).mean(1)
