"""The adjoint chain of L1Agg for long bags: only the weights that are asked for, in bounded memory.

`chain.kappa_table` holds the weights of all sizes up to n, n² / 2 rows; here one round is in
memory, and for the backward pass each √R-th of R rounds, from which the others are computed again.
Gradients of the unit's weights are added up round by round, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dragn_cache.aggregators.recursion.chain import MARGIN, ChainLayout, Fold

TABLE_VALUES = 2**26  # the most of a `chain.kappa_table`, of which nine are made in training


@dataclass(frozen=True)
class Sizes:
    """The sizes of bags whose weights are asked for, each once, ascending, on maps of h × w."""

    sizes: tuple[int, ...]
    height: int
    width: int

    @property
    def layout(self) -> ChainLayout:
        """Of maps of this size; its rows are not used."""
        return ChainLayout(0, self.height, self.width)

    @property
    def rounds(self) -> int:
        """R, those of the longest bag."""
        return (self.sizes[-1] - 1) // 2

    def of_round(self, r: int) -> Iterator[tuple[int, int, slice]]:
        """Of each size that takes r rounds its number, its block, and its rows among all."""
        first = 0
        for number, n in enumerate(self.sizes):
            if (n - 1) // 2 == r:
                yield number, (n + 1) % 2, slice(first, first + n)
            first += n


def long_kappas(weight: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """(G, Σ n, h w), the kappas of the sizes one after the other, and (G, sizes) the beta_n / b.

    Args:
        weight: (G, 3, k, k), of G kernels.
    """
    kappas, factors = _LongChain.apply(weight, sizes)
    return kappas, factors


class _LongChain(torch.autograd.Function):
    """weight (G, 3, k, k), sizes -> kappas (G, Σ n, P), factors (G, sizes)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
        groups, pixels = len(weight), sizes.layout.pixels
        fold = Fold(weight.flip(1, 2, 3), sizes.layout)
        kappas = weight.new_empty(groups, sum(sizes.sizes), pixels)
        factors = weight.new_empty(groups, len(sizes.sizes))
        wanted = {(n - 1) // 2 for n in sizes.sizes}
        step = max(1, math.isqrt(sizes.rounds))
        block, total, kept = _first(weight, pixels), weight.new_zeros(groups, 2), list[Tensor]()
        for r in range(sizes.rounds + 1):
            if r % step == 0 and ctx.needs_input_grad[0]:
                kept.append(block)
            for number, parity, rows in sizes.of_round(r) if r in wanted else ():
                kappas[:, rows] = block[:, parity, MARGIN : MARGIN + rows.stop - rows.start]
                factors[:, number] = total[:, parity]
            if r < sizes.rounds:
                total = total + block.sum((2, 3))
                block = _next(block, fold)
        ctx.save_for_backward(weight, *kept)
        ctx.sizes, ctx.step = sizes, step
        return kappas, factors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kappas: Tensor, grad_factors: Tensor) -> tuple[Tensor, None]:
        weight, *kept = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        fold, unfold = Fold(weight.flip(1, 2, 3), sizes.layout), Fold(weight, sizes.layout)
        wanted = {(n - 1) // 2 for n in sizes.sizes}
        gradient = torch.zeros_like(weight, dtype=torch.float64)
        # Of the inner rows of a round, (G, 2, 2 r + 2, P), and of the sum over them, (G, 2).
        grad = weight.new_zeros(len(weight), 2, 2 * sizes.rounds + 2, sizes.layout.pixels)
        of_sums = weight.new_zeros(len(weight), 2)
        blocks: list[Tensor] = []
        for r in range(sizes.rounds, -1, -1):
            grad += of_sums[:, :, None, None]
            for number, parity, rows in sizes.of_round(r) if r in wanted else ():
                grad[:, parity, : rows.stop - rows.start] += grad_kappas[:, rows]
                of_sums[:, parity] += grad_factors[:, number]
            if r == 0:
                break
            if not blocks:
                first = (r - 1) // ctx.step
                blocks = [kept[first]]
                for _ in range(first * ctx.step, r - 1):
                    blocks.append(_next(blocks[-1], fold))
            # See `chain._Chain.backward`.
            windows = _windows(blocks.pop()).flatten(1, 2)
            gradient += unfold.weight_gradient(windows, grad.flatten(1, 2))
            grad = unfold(_windows(grad))
        return gradient.to(weight).flip(1, 2, 3), None


def _first(weight: Tensor, pixels: int) -> Tensor:
    """(G, 2, rows, P): the blocks of kappa_1 and kappa_2, with their margins."""
    block = weight.new_zeros(len(weight), 2, ChainLayout.block_rows(0), pixels)
    block[:, 0, MARGIN] = 1 / pixels
    block[:, 1, MARGIN : MARGIN + 2] = 0.5 / pixels
    return block


def _next(block: Tensor, fold: Fold) -> Tensor:
    """The blocks of the next round."""
    inner = fold(_windows(block))
    return torch.nn.functional.pad(inner, (0, 0, MARGIN, MARGIN))


def _windows(rows: Tensor) -> Tensor:
    """(G, 2, m, P) -> (G, 2, m - 2, 3 P): each three neighbouring rows, a view."""
    rows = rows.contiguous()
    groups, blocks, count, pixels = rows.shape
    strides = (blocks * count * pixels, count * pixels, pixels, 1)
    return rows.as_strided((groups, blocks, count - 2, 3 * pixels), strides)


def needed_values(n: int, pixels: int, *, training: bool) -> float:
    """About the values that `long_kappas` takes for bags of up to n instances, for each kernel."""
    return ((6 * math.isqrt(n // 2) if training else 0) + 40) * n * pixels


def is_long(layout: ChainLayout, groups: int) -> bool:
    """Whether a table of all sizes would be too large."""
    return groups * layout.rows * layout.pixels > TABLE_VALUES
