"""Weighted sums over the instances of each bag and the cells of their maps, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values of a block: on a CPU few enough to stay in the cache, on a GPU enough to keep it busy.
BLOCK_VALUES = 1 << 19
DEVICE_BLOCK_VALUES = 1 << 26


def weighted_pool(values: Tensor, kappa: Tensor, offsets: Tensor) -> Tensor:
    """(B, C) in the dtype of ``kappa``: the sum over a bag's instances i and pixels p of κ x.

    Under ``torch.func.vmap`` over ``kappa`` the values are read once for all.

    Args:
        values: (N, C, P), any floating dtype.
        kappa: (N, P).
        offsets: (B + 1,) on the CPU, no bag empty.
    """
    pooled: Tensor = _WeightedPool.apply(values, kappa[None], offsets)
    return pooled[0]


class _WeightedPool(torch.autograd.Function):
    """values (N, C, P), kappa (M, N, P), offsets -> (M, B, C)."""

    @staticmethod
    def forward(values: Tensor, kappa: Tensor, offsets: Tensor) -> Tensor:
        weights = kappa.transpose(0, 1)
        pooled = kappa.new_zeros(len(offsets) - 1, len(kappa), values.shape[1])
        for bags, rows, bounds in _blocks(values, kappa, offsets):
            # This way round the long axis C is contiguous in the product: with one vector of
            # weights that is three times faster than values @ weights.
            block = values[rows].to(kappa.dtype).transpose(1, 2)
            pooled[bags] += _sum_bags(weights[rows] @ block, bounds)
        return pooled.transpose(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.offsets = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, kappa = ctx.saved_tensors
        offsets = ctx.offsets
        of_bags, weights = grad.transpose(0, 1), kappa.transpose(0, 1)
        of_kappa = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        of_values = torch.empty_like(values) if ctx.needs_input_grad[0] else None
        for bags, rows, bounds in _blocks(values, kappa, offsets):
            sizes = bounds.diff().to(grad.device)
            of_rows = of_bags[bags].repeat_interleave(sizes, 0, output_size=int(bounds[-1]))
            if of_kappa is not None:
                of_kappa[rows] = of_rows @ values[rows].to(kappa.dtype)
            if of_values is not None:
                of_values[rows] = of_rows.transpose(1, 2) @ weights[rows]
        return of_values, None if of_kappa is None else of_kappa.transpose(0, 1), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, kappa: Tensor, offsets: Tensor
    ) -> tuple[Tensor, int]:
        kappa = with_models_first(kappa, in_dims[1], info.batch_size)
        if in_dims[0] is None:
            pooled: Tensor = _WeightedPool.apply(values, kappa.flatten(0, 1), offsets)
            return pooled.reshape(info.batch_size, -1, *pooled.shape[1:]), 0
        each = zip(values.movedim(in_dims[0], 0), kappa, strict=True)
        return torch.stack([_WeightedPool.apply(v, k, offsets) for v, k in each]), 0


def _blocks(
    values: Tensor, kappa: Tensor, offsets: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of whole bags or a piece of a long one: bags, their rows, the bags' bounds in these.

    Pieces are counted from their bag's start, so a bag's sums never depend on its mates.
    """
    N, C, P = values.shape
    if values.dtype == kappa.dtype and len(kappa) == 1:  # nothing as large as the values is made
        yield slice(0, len(offsets) - 1), slice(0, N), offsets
        return
    limit = BLOCK_VALUES if values.device.type == "cpu" else DEVICE_BLOCK_VALUES
    most = max(1, limit // (C * max(P, len(kappa))))
    bounds = offsets.tolist()
    first = 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= most:
            last += 1
        for start in range(bounds[first], bounds[last], most):
            end = min(start + most, bounds[last])
            within = offsets[first : last + 1].clamp(start, end) - start
            yield slice(first, last), slice(start, end), within
        first = last


def _sum_bags(rows: Tensor, bounds: Tensor) -> Tensor:
    """(n, M, C) -> (b, M, C): sums over the bags that end at ``bounds``, in the rows' order."""
    if rows.shape[1] == 1:
        bounds = bounds.to(rows.device)
        flat = torch.segment_reduce(rows[:, 0], "sum", offsets=bounds, axis=0, unsafe=True)
        return flat[:, None]
    # segment_reduce is several times slower on rows as wide as these.
    return torch.stack([rows[start:end].sum(0) for start, end in pairwise(bounds.tolist())])


def with_models_first(x: Tensor, dim: int | None, models: int) -> Tensor:
    """(models, …), from the dimension ``dim`` of models, or None where all models share ``x``."""
    return x.expand(models, *x.shape) if dim is None else x.movedim(dim, 0)
