"""Parameters and BN statistics of units, channels side by side as ``kernels.cpp`` has them.

Feature channels are cut into blocks of as many as a vector has lanes. Where all channels share a
kernel one block stands for all; where each has its own they differ by block and lane.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.recursion import kernels
from dragn_cache.aggregators.recursion.rounds import Plan


def pack_unit(unit: Any, plan: Plan, number: int) -> list[Tensor]:
    """A `DragnUnit`'s parameters for ``kernels.cpp``, with gradients to the unit's own.

    Args:
        number: the first round that they serve, whose BN statistics evaluation takes.

    Returns:
        each convolution's weights and biases, then, with statistics of the batch, BN's weights and
        BN's biases, layer by layer.
    """
    loaded = kernels.kernels(plan.dtype, plan.kernel, plan.inputs)
    assert loaded is not None
    packed, norms = [], unit.norms
    for layer, conv in enumerate(unit.convolutions):
        weight, bias = conv.weight, conv.bias
        if plan.kernel == 1:
            centre = weight.shape[-1] // 2
            weight = weight[:, :, centre : centre + 1, centre : centre + 1]
        if layer < len(norms) and not plan.batch_norm:  # by fixed statistics: a scale and a shift
            norm = norms[layer]
            mean, variance = norm.statistics(number)
            scale = norm.weight * (variance + norm.eps).rsqrt()
            weight = weight * scale[:, None, None, None]
            bias = (bias - mean) * scale + norm.bias
        if layer == plan.layers - 1:  # results of windows that share one are added up
            weight, bias = weight / plan.orders, bias / plan.orders
        packed.append(pack_conv(weight, bias, plan, loaded.lanes))
    if plan.batch_norm:
        for norm in norms:
            packed += [pack_norm(p, plan, loaded.lanes) for p in (norm.weight, norm.bias)]
    return packed


def pack_conv(weight: Tensor, bias: Tensor, plan: Plan, lanes: int) -> Tensor:
    """A convolution's (K, inputs, k, k) weights, (K,) biases as (1 or blocks, values, lanes)."""
    if plan.shared:
        flat = torch.cat((weight.permute(1, 2, 3, 0).flatten(), bias))
        return flat[None, :, None].expand(1, -1, lanes).contiguous()
    own = weight.reshape(plan.channels, -1, *weight.shape[1:]).permute(0, 2, 3, 4, 1).flatten(1)
    return _in_lanes(torch.cat((own, bias.view(plan.channels, -1)), 1), lanes)


def pack_norm(values: Tensor, plan: Plan, lanes: int) -> Tensor:
    """BN's (K,) weights or biases as (1 or blocks, inputs, 1 or lanes)."""
    if plan.shared:
        return values[None, :, None]
    return _in_lanes(values.view(plan.channels, plan.inputs), lanes)


def _in_lanes(values: Tensor, lanes: int) -> Tensor:
    """(C, P) -> (blocks, P, lanes); lanes beyond the last channel are 0."""
    missing = -len(values) % lanes
    padded = nn.functional.pad(values, (0, 0, 0, missing))
    return padded.view(-1, lanes, values.shape[1]).transpose(1, 2).contiguous()


def transposed(packed: Tensor, plan: Plan, outputs: int) -> Tensor:
    """The packed convolution of the gradients: its weights flipped, inputs and outputs swapped."""
    count = plan.inputs * plan.kernel**2 * outputs
    shape = (len(packed), plan.inputs, plan.kernel, plan.kernel, outputs, packed.shape[2])
    weights = packed[:, :count].reshape(shape)
    swapped = weights.flip(2, 3).permute(0, 4, 2, 3, 1, 5).flatten(1, 4)
    return torch.cat((swapped, packed[:, count:]), 1).contiguous()


class Statistics:
    """Statistics of BN's channels from those of every lane, (blocks, groups, inputs, lanes).

    The results have blocks and lanes, or one of each where all channels share a kernel.
    """

    def __init__(self, plan: Plan, blocks: int, lanes: int, pixels: int) -> None:
        self.plan, self.pixels = plan, pixels
        valid = torch.arange(blocks * lanes).view(blocks, 1, 1, lanes) < plan.channels
        self.valid = valid.double()

    def count(self, windows: int) -> int:
        """The number of values in one group and channel."""
        rows = 1 if self.plan.by_window else windows
        return self.pixels * rows * (self.plan.channels if self.plan.shared else 1)

    def total(self, values: Tensor) -> Tensor:
        """Sums in double precision, over channels where they share a kernel."""
        values = values.double() * self.valid
        return values.sum((0, 3), keepdim=True) if self.plan.shared else values

    def moments(self, mean: Tensor, squares: Tensor, windows: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, from every lane's mean and sum of squares around it."""
        each = self.pixels * (1 if self.plan.by_window else windows)
        count = self.count(windows)
        whole = self.total(mean.double() * each) / count
        spread = self.total(squares.double() + each * (mean.double() - whole) ** 2)
        return whole, spread / count

    def by_channel(self, values: Tensor) -> Tensor:
        """(1 or blocks, G, inputs, 1 or lanes) -> (G, K), in the order of BN's channels."""
        flat = values.permute(1, 0, 3, 2).flatten(1, 2)
        return flat[:, : 1 if self.plan.shared else self.plan.channels].flatten(1)
