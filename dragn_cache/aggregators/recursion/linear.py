"""L1Agg's recursion and the pooling after it as one weighted sum over a bag's features.

- **The weights** are those of the adjoint chain (`chain.kappa_table`). It runs once per step over
  tiny tensors, and autograd takes gradients through it to the unit's weights.
- **The sum** (`weighted_pool`) reads the features once forward and once backward, whatever n and
  C are, and M sets of weights share that reading: under ``torch.func.vmap`` the products with M
  vectors become products with one matrix. Features stored as fp16 are converted a block at a
  time, so that the converted ones never leave the cache.
- **Kernels of their own** (mixing ``per_channel``) have a ``kappa`` per channel, as large as a bag
  itself; bags of one size share it (`weighted_pool_by_channel`).
- All sums of a bag run in an order that its own size decides, so no bag depends on its mates.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dragn_cache.aggregators.recursion.chain import ChainLayout, bias_factors, kappa_table
from dragn_cache.aggregators.recursion.long_chain import (
    Sizes,
    is_long,
    long_kappas,
    needed_values,
)
from dragn_cache.aggregators.recursion.weighted_sum import weighted_pool
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of, owners

BagRows = list[tuple[slice, slice]]


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
    layout = ChainLayout.for_bags(int(sizes.max()), height, width)
    if len(weight) == 1 and is_long(layout, len(weight)):
        return _pool_long(
            values,
            bags.offsets,
            weight,
            bias,
            Sizes(tuple(np.unique(sizes.numpy()).tolist()), height, width),
            orders,
        )
    table = kappa_table(weight, layout)
    if len(weight) == 1:
        rows = _table_rows(bags.offsets, layout)
        kappa = _mean_rows(table[0], rows[None] if orders is None else _by_instance(rows, orders))
        pooled = weighted_pool(values, kappa, bags.offsets)
    else:
        pooled = weighted_pool_by_channel(values, table, bags.offsets, layout)
    if layout.rounds == 0:  # no bag has a window
        return pooled
    factors = bias_factors(table, layout).index_select(1, sizes.to(values.device) - 1)
    return torch.addcmul(pooled, bias, factors.T)


def _pool_long(
    values: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    known: Sizes,
    orders: Tensor | None,
) -> Tensor:
    """(B, C): `pool_linearly` by `long_kappas`."""
    kappas, factors = long_kappas(weight, known)
    number = torch.searchsorted(torch.tensor(known.sizes), offsets.diff())
    first = offsets_of(torch.tensor(known.sizes))[number] - offsets[:-1]
    rows = first[owners(offsets)] + torch.arange(len(values))
    kappa = _mean_rows(kappas[0], rows[None] if orders is None else _by_instance(rows, orders))
    pooled = weighted_pool(values, kappa, offsets)
    return torch.addcmul(pooled, bias, factors.index_select(1, number.to(values.device)).T)


def table_values(n: int, pixels: int, groups: int, *, training: bool) -> float:
    """About the values that the weights of bags of up to n instances take, for each kernel."""
    if groups == 1 and is_long(ChainLayout.for_bags(n, pixels, 1), groups):
        return needed_values(n, pixels, training=training)
    return (9 * pixels + 1 if training else pixels + 4) * n**2 / 2


def _table_rows(offsets: Tensor, layout: ChainLayout) -> Tensor:
    """(N,) int64: the table's row with the weights of each instance."""
    sizes = offsets.diff()
    bag = torch.repeat_interleave(sizes)
    return (layout.first_of_kappa(sizes) - offsets[:-1])[bag] + torch.arange(len(bag))


def _by_instance(rows: Tensor, orders: Tensor) -> Tensor:
    """(K, N): by instance the entry that ``rows`` (N,) has at the instance's place in K orders."""
    return torch.empty_like(orders).scatter_(1, orders, rows.expand_as(orders))


def _mean_rows(table: Tensor, rows: Tensor) -> Tensor:
    """(N, P): the mean over K of the table's rows (K, N)."""
    chosen = table.index_select(0, rows.flatten().to(table.device))
    return chosen if len(rows) == 1 else chosen.view(*rows.shape, -1).mean(0)


def weighted_pool_by_channel(
    values: Tensor, table: Tensor, offsets: Tensor, layout: ChainLayout
) -> Tensor:
    """(B, C) in the dtype of ``table``: as `weighted_pool`, with a κ for each channel.

    Args:
        values: (N, C, P), any floating dtype.
        table: (C, rows, P), as `kappa_table` makes it by ``layout``.
        offsets: (B + 1,) on the CPU, no bag empty.
    """
    pooled: Tensor = _PoolByChannel.apply(values, table, _bag_rows(offsets, layout))
    return pooled


class _PoolByChannel(torch.autograd.Function):
    """values (N, C, P), table (C, rows, P), `_bag_rows` -> (B, C), bag by bag."""

    @staticmethod
    def forward(values: Tensor, table: Tensor, bags: BagRows) -> Tensor:
        by_row = table.transpose(0, 1)
        sums = [(values[rows].to(table.dtype) * by_row[kappa]).sum((0, 2)) for rows, kappa in bags]
        return torch.stack(sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, BagRows], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.bags = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, table = ctx.saved_tensors
        by_row = table.transpose(0, 1)
        of_values = torch.empty_like(values) if ctx.needs_input_grad[0] else None
        of_table = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        for of_bag, (rows, kappa) in zip(grad[:, :, None], ctx.bags, strict=True):
            if of_values is not None:
                of_values[rows] = of_bag * by_row[kappa]
            if of_table is not None:
                of_kappa = of_table[:, kappa].transpose(0, 1)
                of_kappa.addcmul_(values[rows].to(table.dtype), of_bag)
        return of_values, of_table, None


def _bag_rows(offsets: Tensor, layout: ChainLayout) -> BagRows:
    """Each bag's rows, and those of its kappa in the table."""
    return [
        (slice(start, end), layout.kappa(end - start)) for start, end in pairwise(offsets.tolist())
    ]
