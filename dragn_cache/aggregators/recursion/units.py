"""Units: the small networks that fold instances into one, and their batch normalisation.

DRAGN folds three instances, HAMIL two. A unit has windows as a batch of M maps, instances as
channels. The caller decides which windows are in a batch, and over which of them BN takes its
statistics (`NormPass`).
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragn_cache.aggregators.declared import BatchNormScope, Init, UnitName
from dragn_cache.aggregators.recursion.shifts import DENSE_PIXELS, shift_matrices

CONVOLUTIONS: dict[UnitName, int] = {"L1Agg": 1, "L2Agg": 2, "L3Agg": 3}


class DragnUnit(nn.Sequential):
    """Folds k instances into one: (M, k channels, h, w) -> (M, channels, h, w).

    ``convolutions`` same-padded convolutions with [BN and] ReLU between them, none after the
    last. Called by itself in training mode, BN behaves as ``nn.BatchNorm2d``.

    Args:
        convolutions: 1, 2 or 3, for L1Agg, L2Agg and L3Agg.
        instances: k; DRAGN folds three.
        channels: feature channels of a map: 1 (each by itself, one kernel for all) or C.
        groups: 1, or C for a kernel per feature channel.
        kernel: odd side of the kernel in pixels.
        bn: whether hidden convolutions are normalised.
        init: "mean" or "default".
    """

    def __init__(
        self,
        convolutions: int,
        *,
        instances: int = 3,
        channels: int,
        groups: int,
        kernel: int,
        bn: bool,
        init: Init,
    ) -> None:
        super().__init__()
        self.instances = instances
        for number in range(1, convolutions + 1):
            last = number == convolutions
            inputs = instances * channels
            out = channels if last else inputs
            conv = UnitConv(inputs, out, kernel, padding=kernel // 2, groups=groups)
            if init == "mean":
                _start_as_mean(conv, instances) if last else _start_as_identity(conv)
            self.append(conv)
            if not last:
                if bn:
                    self.append(UnitNorm(out))
                self.append(nn.ReLU())

    @property
    def convolutions(self) -> list[UnitConv]:
        return [layer for layer in self if isinstance(layer, UnitConv)]

    @property
    def norms(self) -> list[UnitNorm]:
        """BN behind the hidden convolutions; none without BN."""
        return [layer for layer in self if isinstance(layer, UnitNorm)]

    def forward(self, x: Tensor, norms: NormPass | None = None) -> Tensor:
        """Fold windows; in a recursion ``norms`` takes BN's statistics instead of the layers."""
        for layer in self:
            x = layer(x, norms) if isinstance(layer, UnitNorm) else layer(x)
        return x


class UnitConv(nn.Conv2d):
    """``nn.Conv2d``, same-padded; on small maps a product with a matrix.

    A same-padded convolution of K channels on an h×w map is a dense (K h w, K' h w) matrix. For one
    small kernel and very many small maps that product is several times faster than a convolution
    with so few channels, forward and backward, although it is more arithmetic.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(M, K, h, w) -> (M, K', h, w)."""
        M, K, height, width = x.shape
        if K > 3 or height * width > DENSE_PIXELS:
            return super().forward(x)
        pixels, outputs = height * width, self.out_channels
        shifts = shift_matrices(height, width, self.kernel_size[0]).to(x)
        taps = self.weight.flatten(2).permute(1, 0, 2).reshape(K * outputs, -1)
        matrix = (taps @ shifts.flatten(1)).view(K, outputs, pixels, pixels)
        matrix = matrix.transpose(1, 2).reshape(K * pixels, outputs * pixels)
        bias = cast(Tensor, self.bias).repeat_interleave(pixels)
        y = torch.addmm(bias, x.reshape(M, K * pixels), matrix)
        return y.view(M, outputs, height, width)


class UnitNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of a recursion (``NormPass``) in training."""

    def forward(self, x: Tensor, norms: NormPass | None = None) -> Tensor:
        """(M, K, h, w) -> (M, K, h, w)."""
        if norms is None or not self.training:
            return super().forward(x)
        return norms.normalise(self, x)


class _Moments(NamedTuple):
    """Statistics of one BN layer in one round; G is 1 for scope round, the W windows for window."""

    values: int  # in each group and channel
    mean: Tensor  # (G, K)
    variance: Tensor  # (G, K), unbiased
    loop_index: Tensor  # (W,)


class NormPass:
    """BN in one training pass: statistics round by round, one move of the running ones at the end.

    Attributes:
        by_window: whether each window has statistics of its own (scope window).
    """

    def __init__(self, scope: BatchNormScope) -> None:
        self.by_window = scope == "window"
        self._loop_index = torch.empty(0, dtype=torch.int64)
        self._moments: dict[UnitNorm, list[_Moments]] = {}

    def start_round(self, loop_index: Tensor) -> None:
        """Begin a round with windows (W,) of these numbers in the plain loop (see `Round`)."""
        self._loop_index = loop_index

    def normalise(self, norm: UnitNorm, x: Tensor) -> Tensor:
        """(M, K, h, w) -> (M, K, h, w) by the statistics of the round, or of each window."""
        groups = len(self._loop_index) if self.by_window else 1
        M, K, height, width = x.shape
        # Groups become channels, so that one library call normalises each by itself. With
        # momentum 1 it leaves the batch's own moments in the two running buffers.
        parts = x.reshape(groups, M // groups, K, height, width).transpose(0, 1)
        mean, variance = norm.weight.new_zeros(2, groups * K)
        y = F.batch_norm(
            parts.reshape(M // groups, groups * K, height, width),
            mean,
            variance,
            norm.weight.repeat(groups),
            norm.bias.repeat(groups),
            training=True,
            momentum=1.0,
            eps=norm.eps,
        )
        values = x.numel() // (groups * K)
        self.record(norm, values, mean.view(groups, K), variance.view(groups, K), self._loop_index)
        return y.reshape(M // groups, groups, K, height, width).transpose(0, 1).reshape(x.shape)

    def record(
        self, norm: UnitNorm, values: int, mean: Tensor, variance: Tensor, loop_index: Tensor
    ) -> None:
        """Add a layer's statistics in a round; see `_Moments`."""
        mean, variance = mean.to(norm.weight.dtype), variance.to(norm.weight.dtype)
        self._moments.setdefault(norm, []).append(_Moments(values, mean, variance, loop_index))

    def finish(self) -> None:
        """Move the running statistics of every BN layer that normalised anything."""
        for norm, moments in self._moments.items():
            if self.by_window:
                _move_by_window(norm, moments)
            else:
                _move_once(norm, moments)


@torch.no_grad()
def _move_once(norm: UnitNorm, rounds: list[_Moments]) -> None:
    """One step of the running statistics towards the pooled moments of all rounds."""
    mean = torch.cat([m.mean for m in rounds])
    variance = torch.cat([m.variance for m in rounds])
    counts = torch.tensor([m.values for m in rounds]).to(mean)[:, None]
    total = counts.sum()
    pooled = (counts * mean).sum(0) / total
    squares = (counts - 1) * variance + counts * (mean - pooled) ** 2
    _step(norm, pooled[None], squares.sum(0, keepdim=True) / (total - 1))


@torch.no_grad()
def _move_by_window(norm: UnitNorm, rounds: list[_Moments]) -> None:
    """One step of the running statistics for each window, in the order of the reference loop."""
    mean = torch.cat([m.mean for m in rounds])
    order = torch.cat([m.loop_index for m in rounds]).argsort().to(mean.device)
    variance = torch.cat([m.variance for m in rounds])
    _step(norm, mean[order], variance[order])


def _step(norm: UnitNorm, means: Tensor, variances: Tensor) -> None:
    """Move the running statistics by S exponential steps at once, to moments (S, K)."""
    momentum, steps = cast(float, norm.momentum), len(means)
    kept = (1 - momentum) ** torch.arange(steps - 1, -1, -1, device=means.device, dtype=means.dtype)
    for running, moments in ((norm.running_mean, means), (norm.running_var, variances)):
        cast(Tensor, running).mul_((1 - momentum) ** steps).add_(momentum * (kept @ moments))
    cast(Tensor, norm.num_batches_tracked).add_(steps)


@torch.no_grad()
def _start_as_identity(conv: nn.Conv2d) -> None:
    nn.init.dirac_(conv.weight, conv.groups)
    nn.init.zeros_(cast(Tensor, conv.bias))


@torch.no_grad()
def _start_as_mean(conv: nn.Conv2d, instances: int) -> None:
    """Output channel c becomes the mean of its ``instances`` input channels, pixel by pixel."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(cast(Tensor, conv.bias))
    centre = conv.kernel_size[0] // 2
    for c in range(conv.out_channels):
        first = 0 if conv.groups > 1 else instances * c  # within its group
        conv.weight[c, first : first + instances, centre, centre] = 1 / instances
