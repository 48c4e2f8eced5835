"""The adjoint chain of L1Agg: the weight of every pixel of every instance, by the size of a bag.

L1Agg has no activation, so "DRAGN", Algorithm 1, is linear in the features, and so is global
average pooling: channel c of an n-bag's embedding is

    a[c] = sum over instances i and pixels p of kappa_n[i, p] x_i[c, p], plus beta_n

where ``kappa_n`` (n, h w) and ``beta_n`` depend on n and the unit's weights only. They are built
from the end of the recursion backwards: ``kappa_1`` is the average over pixels, ``kappa_2`` half
of it for either instance, and ``kappa_n`` the transpose of one round applied to ``kappa_(n-2)``;
``beta_n = beta_(n-2) + b sum(kappa_(n-2))``.

All ``kappa_n`` lie in one table (`ChainLayout`), odd and even n side by side, so that a round of
the chain is one product for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

from dragn_cache.aggregators.recursion.shifts import DENSE_PIXELS, shift_matrices
from dragn_cache.aggregators.recursion.weighted_sum import with_models_first

Number = TypeVar("Number", int, Tensor)
MARGIN = 2  # rows of 0 on either side of a kappa: the transpose of a round has two rows more


@dataclass(frozen=True)
class ChainLayout:
    """The rows of a table (G, rows, h w) of all kappas of bags that take up to ``rounds`` rounds.

    Bags of ``2 r + 1`` and ``2 r + 2`` instances take r rounds. Their kappas are two blocks of
    2 r + 6 rows: a margin of 0, 2 r + 2 inner rows, a margin of 0. The last inner row is 0 where n
    is odd. With one round::

        0 0 a 0 0 0 | 0 0 b c 0 0 | 0 0 d e f 0 0 0 | 0 0 g h i j 0 0
        kappa_1       kappa_2       kappa_3           kappa_4

    Views of a table have the two blocks of a round side by side, (G, 2, …).
    """

    rounds: int
    height: int
    width: int

    @classmethod
    def for_bags(cls, longest: int, height: int, width: int) -> ChainLayout:
        """The layout with room for bags of up to ``longest`` instances, at least 1."""
        return cls((longest - 1) // 2, height, width)

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def rows(self) -> int:
        return self.first_of_round(self.rounds + 1)

    @staticmethod
    def block_rows(r: Number) -> Number:
        return 2 * r + 2 + 2 * MARGIN

    @staticmethod
    def first_of_round(r: Number) -> Number:
        """The row at which the two blocks of round r begin."""
        return 2 * r * (r + 5)  # the sum of 2 (2 q + 6) over the rounds q before it

    @classmethod
    def first_of_kappa(cls, n: Number) -> Number:
        """The row at which ``kappa_n`` begins, for a number or a tensor of numbers."""
        r, even = (n - 1) // 2, (n + 1) % 2
        return cls.first_of_round(r) + even * cls.block_rows(r) + MARGIN

    def kappa(self, n: int) -> slice:
        """The n rows of ``kappa_n``."""
        first = self.first_of_kappa(n)
        return slice(first, first + n)

    def block_of_row(self) -> Tensor:
        """(rows,) int64: the block that each row is in, which is n - 1 of its kappa."""
        blocks = torch.arange(2 * self.rounds + 2)
        return blocks.repeat_interleave(self.block_rows(blocks // 2))

    def inner_rows(self, table: Tensor, r: int) -> Tensor:
        """(G, 2, 2 r + 2, P): the inner rows of round r, a view."""
        return self._rows(table, r, margin=MARGIN, window=1)

    def windows(self, table: Tensor, r: int) -> Tensor:
        """(G, 2, 2 r + 4, 3 P): each three neighbouring rows of round r, a view.

        They are as many as the inner rows of round r + 1.
        """
        return self._rows(table, r, margin=0, window=3)

    def inner_windows(self, table: Tensor, r: int) -> Tensor:
        """(G, 2, 2 r, 3 P): each three neighbouring inner rows of round r, a view.

        They are as many as the inner rows of round r - 1.
        """
        return self._rows(table, r, margin=MARGIN, window=3)

    def _rows(self, table: Tensor, r: int, *, margin: int, window: int) -> Tensor:
        """``window`` rows from each row on, as long as they are ``margin`` rows inside a block."""
        groups, rows, pixels = table.shape
        block = self.block_rows(r)
        return table.as_strided(
            (groups, 2, block - 2 * margin - window + 1, window * pixels),
            (rows * pixels, block * pixels, pixels, 1),
            table.storage_offset() + (self.first_of_round(r) + margin) * pixels,
        )


def kappa_table(weight: Tensor, layout: ChainLayout) -> Tensor:
    """(G, rows, h w): all kappas of ``layout``, by weights (G, 3, k, k) of G kernels.

    Without a round the table has no gradient.
    """
    start = weight.new_zeros(len(weight), layout.rows, layout.pixels)
    start[:, layout.kappa(1)] = 1 / layout.pixels
    start[:, layout.kappa(2)] = 0.5 / layout.pixels
    if layout.rounds == 0:
        return start
    table: Tensor = _Chain.apply(weight, start, layout)
    return table


def bias_factors(table: Tensor, layout: ChainLayout) -> Tensor:
    """(G, n): ``beta_n / b``, the sum over ``kappa_(n-2)``, ``kappa_(n-4)``, …, for n = 1, 2, …"""
    block = layout.block_of_row().to(table.device)
    sums = table.new_zeros(len(table), 2 * layout.rounds + 2).index_add(1, block, table.sum(2))
    by_parity = sums.view(len(table), -1, 2)
    return F.pad(by_parity[:, :-1], (0, 0, 1, 0)).cumsum(1).flatten(1)


class _Chain(torch.autograd.Function):
    """weight (G, 3, k, k), the table with kappa_1 and kappa_2 only -> the whole table.

    A window of three rows through the flipped kernels is an inner row of the next round. One
    function with three operations a round: left to autograd, so many tiny steps take as long as a
    pass over the features.
    """

    @staticmethod
    def forward(weight: Tensor, start: Tensor, layout: ChainLayout) -> Tensor:
        fold = Fold(weight.flip(1, 2, 3), layout)
        table = start.clone()
        for r in range(layout.rounds):
            layout.inner_rows(table, r + 1).copy_(fold(layout.windows(table, r)))
        return table

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, ChainLayout], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.layout = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, table = ctx.saved_tensors
        layout: ChainLayout = ctx.layout
        unfold = Fold(weight, layout)
        grad = grad.clone(memory_format=torch.contiguous_format)
        for r in range(layout.rounds, 0, -1):
            # The transpose of a transposed round is a round. The last inner row of an odd kappa's
            # block is no part of it and takes a gradient all the same; this reaches only such rows
            # of the rounds before, and in the weights' gradient its factors are windows of 0.
            layout.inner_rows(grad, r - 1).add_(unfold(layout.inner_windows(grad, r)))
        rounds = range(layout.rounds)
        windows = torch.cat([layout.windows(table, r).flatten(1, 2) for r in rounds], dim=1)
        results = torch.cat([layout.inner_rows(grad, r + 1).flatten(1, 2) for r in rounds], dim=1)
        return unfold.weight_gradient(windows, results).flip(1, 2, 3), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], weight: Tensor, start: Tensor, layout: Any
    ) -> tuple[Tensor, int]:
        weight, start = (
            with_models_first(x, d, info.batch_size).flatten(0, 1)
            for x, d in zip((weight, start), in_dims[:2], strict=True)
        )
        table: Tensor = _Chain.apply(weight, start, layout)
        return table.view(info.batch_size, -1, *table.shape[1:]), 0


class Fold:
    """Three maps into one by a same-padded convolution without a bias, G kernels side by side."""

    def __init__(self, weight: Tensor, layout: ChainLayout) -> None:
        self.weight, self.size = weight, (layout.height, layout.width)
        self.dense = layout.pixels <= DENSE_PIXELS
        if self.dense:
            self.shifts = shift_matrices(*self.size, weight.shape[-1]).to(weight).flatten(1)
            matrix = weight.flatten(2) @ self.shifts  # (G, 3, P P)
            self.matrix = matrix.view(-1, 3 * layout.pixels, layout.pixels)

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
