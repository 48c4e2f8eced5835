"""L1Agg's recursion and the pooling after it as one weighted sum over a bag's features.

L1Agg has no activation, so "DRAGN", Algorithm 1, is linear in the features, and so is global
average pooling: channel c of an n-bag's embedding is

    a[c] = sum over instances i and pixels p of kappa_n[i, p] x_i[c, p], plus beta_n

where ``kappa_n`` (n, h w) and ``beta_n`` depend on n and the unit's weights only. They are built
from the end of the recursion backwards: ``kappa_1`` is the average over pixels, ``kappa_2`` half
of it for either instance, and ``kappa_n`` the transpose of one round applied to ``kappa_(n-2)``;
``beta_n = beta_(n-2) + b sum(kappa_(n-2))``.

- **The chain** (`kappa_table`) runs once per step over tiny tensors, odd and even n side by side,
  and autograd takes gradients through it to the unit's weights.
- **The sum** (`weighted_pool`) reads the features once forward and once backward, whatever n and
  C are, and M sets of weights share that reading: under ``torch.func.vmap`` the products with M
  vectors become products with one matrix. Features stored as fp16 are converted a block at a
  time, so that the converted ones never leave the cache.
- **Kernels of their own** (mixing ``per_channel``) have a ``kappa`` per channel, as large as a bag
  itself; bags of one size share it (`weighted_pool_by_channel`).
- All sums of a bag run in an order that its own size decides, so no bag depends on its mates.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

from dragn_cache.aggregators.recursion.shifts import DENSE_PIXELS, shift_matrices
from dragn_cache.aggregators.recursion.weighted_sum import weighted_pool, with_models_first
from dragn_cache.ragged import RaggedBags


def pool_linearly(
    bags: RaggedBags, weight: Tensor, bias: Tensor, orders: Tensor | None = None
) -> Tensor:
    """(B, C) in the dtype of ``weight``: L1Agg's recursion and global average pooling.

    Equal to Algorithm 1 with ``conv2d(windows, weight, bias)`` as unit, values and gradients.

    Args:
        bags: (N, C, h, w) or (N, C) values of any floating dtype, each bag with an instance.
        weight: (1, 3, k, k) shared by all channels, or (C, 3, k, k), a kernel for each.
        bias: (1,) or (C,).
        orders: (K, N) as in `orders`: the result is the mean over the bags in K orders, which is
            the sum with the mean of their weights. Only with ``weight`` (1, …).
    """
    values = bags.values
    height, width = values.shape[2:] if values.dim() == 4 else (1, 1)
    values = values.reshape(len(values), values.shape[1], -1)
    sizes = bags.offsets.diff()
    longest = int(sizes.max())
    table = kappa_table(weight, longest, height, width)
    if len(weight) == 1:
        owner = torch.repeat_interleave(sizes)
        rows = (first_row(sizes) - bags.offsets[:-1])[owner] + torch.arange(len(values))
        kappa = _kappas(table[0], rows[None] if orders is None else _by_instance(rows, orders))
        pooled = weighted_pool(values, kappa, bags.offsets)
    else:
        pooled = weighted_pool_by_channel(values, table, bags.offsets)
    if longest <= 2:  # no bag meets the unit
        return pooled
    factors = bias_factors(table, longest).index_select(1, sizes.to(values.device) - 1)
    return torch.addcmul(pooled, bias, factors.T)


def _by_instance(rows: Tensor, orders: Tensor) -> Tensor:
    """(K, N): what ``rows`` (N,) has for the place of each instance in K orders."""
    return torch.empty_like(orders).scatter_(1, orders, rows.expand_as(orders))


def _kappas(table: Tensor, rows: Tensor) -> Tensor:
    """(N, P): the table's rows (K, N), their mean over K."""
    chosen = table.index_select(0, rows.flatten().to(table.device))
    return chosen if len(rows) == 1 else chosen.view(*rows.shape, -1).mean(0)


# --- the chain ---------------------------------------------------------------------------------


def kappa_table(weight: Tensor, longest: int, height: int, width: int) -> Tensor:
    """(G, rows, h w): ``kappa_1``, ``kappa_2``, … at least to ``longest``, with rows of 0 between.

    ``kappa_n`` is the n rows from `first_row` (n) on.

    Args:
        weight: (G, 3, k, k), G kernels side by side.
        longest: the largest n; without one above 2 the table has no gradient.
    """
    rounds = max(0, (longest - 1) // 2)
    start = weight.new_zeros(len(weight), _round_start(rounds + 1), height * width)
    start[:, 2] = 1 / (height * width)  # kappa_1
    start[:, 8:10] = 0.5 / (height * width)  # kappa_2
    if rounds == 0:
        return start
    table: Tensor = _Chain.apply(weight, start, rounds, (height, width))
    return table


def first_row(n: Any) -> Any:
    """Where ``kappa_n`` begins in the table; n is a number or a tensor of numbers."""
    r, even = (n - 1) // 2, (n + 1) % 2
    return _round_start(r) + 2 + even * (2 * r + 6)


def _round_start(r: Any) -> Any:
    """Where round r begins in the table.

    It is two blocks of 2 r + 6 rows, for n = 2 r + 1 and n = 2 r + 2: two rows of 0, 2 r + 2 rows
    (the last one 0 where n is odd), two rows of 0.
    """
    return 2 * r * (r + 5)


class _Chain(torch.autograd.Function):
    """weight (G, 3, k, k), the table but for its first round (G, rows, P) -> `kappa_table`.

    A window of three rows through the flipped kernels is a row of the next round, and with two
    rows of 0 before and after kappa the windows are all its rows. One function with three
    operations a round: left to autograd, so many tiny steps take as long as a pass over the
    features.
    """

    @staticmethod
    def forward(weight: Tensor, start: Tensor, rounds: int, size: tuple[int, int]) -> Tensor:
        fold = _Round(weight.flip(1, 2, 3), *size)
        table = start.clone()
        for r in range(rounds):
            _inner_rows(table, r + 1).copy_(fold(_windows(table, r, margin=0)))
        return table

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, int, tuple[int, int]], output: Tensor
    ) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.rounds, ctx.size = inputs[2:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, table = ctx.saved_tensors
        unfold = _Round(weight, *ctx.size)
        grad = grad.clone(memory_format=torch.contiguous_format)
        for r in range(ctx.rounds - 1, -1, -1):
            # The transpose of a transposed round is a round. What it leaves in the row that an
            # odd kappa does not have meets only windows that are 0.
            _inner_rows(grad, r).add_(unfold(_windows(grad, r + 1, margin=2)))
        rounds = range(ctx.rounds)
        windows = torch.cat([_windows(table, r, margin=0).flatten(1, 2) for r in rounds], dim=1)
        of_windows = torch.cat([_inner_rows(grad, r + 1).flatten(1, 2) for r in rounds], dim=1)
        return unfold.weight_gradient(windows, of_windows).flip(1, 2, 3), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], weight: Tensor, start: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        weight, start = (
            with_models_first(x, d, info.batch_size).flatten(0, 1)
            for x, d in zip((weight, start), in_dims[:2], strict=True)
        )
        table: Tensor = _Chain.apply(weight, start, *rest)
        return table.view(info.batch_size, -1, *table.shape[1:]), 0


class _Round:
    """Three maps into one by a same-padded convolution without a bias, G kernels side by side."""

    def __init__(self, weight: Tensor, height: int, width: int) -> None:
        self.weight, self.size = weight, (height, width)
        self.dense = height * width <= DENSE_PIXELS
        if self.dense:
            pixels = height * width
            self.shifts = shift_matrices(height, width, weight.shape[-1]).to(weight).flatten(1)
            matrix = weight.flatten(2) @ self.shifts  # (G, 3, P P)
            self.matrix = matrix.view(-1, 3 * pixels, pixels)

    def __call__(self, windows: Tensor) -> Tensor:
        """(G, 2, m, 3 P) -> (G, 2, m, P)."""
        groups, _, count, _ = windows.shape
        if self.dense:
            folded = windows.reshape(groups, 2 * count, -1) @ self.matrix
            return folded.view(groups, 2, count, -1)
        maps = self._maps(windows.reshape(groups, 2 * count, -1))
        padding = self.weight.shape[-1] // 2
        y = F.conv2d(maps, self.weight, padding=padding, groups=groups)
        return y.flatten(2).transpose(0, 1).reshape(groups, 2, count, -1)

    def weight_gradient(self, windows: Tensor, grad: Tensor) -> Tensor:
        """(G, 3, k, k), from windows (G, m, 3 P) and gradients (G, m, P) of their results."""
        if self.dense:
            matrix = windows.transpose(1, 2) @ grad  # (G, 3 P, P)
            taps = matrix.view(len(matrix), 3, -1) @ self.shifts.T
            return taps.view_as(self.weight)
        conv_taps: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            self._maps(windows),
            list(self.weight.shape),
            grad.transpose(0, 1).reshape(grad.shape[1], -1, *self.size),
            padding=self.weight.shape[-1] // 2,
            groups=len(self.weight),
        )
        return conv_taps

    def _maps(self, windows: Tensor) -> Tensor:
        """(G, m, 3 P) -> (m, 3 G, h, w)."""
        return windows.transpose(0, 1).reshape(windows.shape[1], -1, *self.size)


def _inner_rows(table: Tensor, r: int) -> Tensor:
    """(G, 2, 2 r + 2, P): the rows of round r without those of 0 around them, a view."""
    return _strided(table, r, margin=2, count=2 * r + 2, width=table.shape[2])


def _windows(table: Tensor, r: int, *, margin: int) -> Tensor:
    """(G, 2, m, 3 P): the windows of three rows of round r, without ``margin`` rows at the ends."""
    count = 2 * r + 4 - 2 * margin
    return _strided(table, r, margin=margin, count=count, width=3 * table.shape[2])


def _strided(table: Tensor, r: int, *, margin: int, count: int, width: int) -> Tensor:
    groups, rows, pixels = table.shape
    return table.as_strided(
        (groups, 2, count, width),
        (rows * pixels, (2 * r + 6) * pixels, pixels, 1),
        table.storage_offset() + (_round_start(r) + margin) * pixels,
    )


@lru_cache(maxsize=16)
def _block_of_row(rounds: int) -> Tensor:
    """(rows,) int64: n - 1 of the block that each row of a table is in."""
    blocks = torch.arange(2 * rounds + 2)
    return blocks.repeat_interleave(blocks // 2 * 2 + 6)


def bias_factors(table: Tensor, longest: int) -> Tensor:
    """(G, n): ``beta_n / b``, the sum over ``kappa_(n-2)``, ``kappa_(n-4)``, …, for n = 1, 2, …"""
    rounds = (longest - 1) // 2
    owner = _block_of_row(rounds).to(table.device)
    totals = table.new_zeros(len(table), 2 * rounds + 2).index_add(1, owner, table.sum(2))
    by_parity = totals.view(len(table), -1, 2)
    return F.pad(by_parity[:, :-1], (0, 0, 1, 0)).cumsum(1).flatten(1)


def weighted_pool_by_channel(values: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
    """(B, C) in the dtype of ``table``: as `weighted_pool`, with a κ for each channel.

    Args:
        values: (N, C, P), any floating dtype.
        table: (C, rows, P), as `kappa_table` makes it, for the largest bag.
        offsets: (B + 1,) on the CPU, no bag empty.
    """
    pooled: Tensor = _PoolByChannel.apply(values, table, offsets)
    return pooled


class _PoolByChannel(torch.autograd.Function):
    """values (N, C, P), table (C, rows, P), offsets -> (B, C), bag by bag."""

    @staticmethod
    def forward(values: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        by_row = table.transpose(0, 1)
        sums = [
            (values[rows].to(table.dtype) * by_row[kappa]).sum((0, 2))
            for rows, kappa in _bag_rows(offsets)
        ]
        return torch.stack(sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.offsets = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, table = ctx.saved_tensors
        by_row = table.transpose(0, 1)
        of_values = torch.empty_like(values) if ctx.needs_input_grad[0] else None
        of_table = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        for of_bag, (rows, kappa) in zip(grad[:, :, None], _bag_rows(ctx.offsets), strict=True):
            if of_values is not None:
                of_values[rows] = of_bag * by_row[kappa]
            if of_table is not None:
                of_kappa = of_table[:, kappa].transpose(0, 1)
                of_kappa.addcmul_(values[rows].to(table.dtype), of_bag)
        return of_values, of_table, None


def _bag_rows(offsets: Tensor) -> Iterator[tuple[slice, slice]]:
    """A bag's rows, and its kappa's rows in the table, bag by bag."""
    for start, end in pairwise(offsets.tolist()):
        first = first_row(end - start)
        yield slice(start, end), slice(first, first + end - start)
