"""Units: the small networks that fold instances into one, and their batch normalisation.

DRAGN folds three instances, HAMIL two. A unit has windows as a batch of M maps, instances as
channels. The caller decides which windows are in a batch, and over which of them BN takes its
statistics (`NormPass`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragn_cache.aggregators.declared import BatchNormScope, Init, UnitName
from dragn_cache.aggregators.recursion.shifts import DENSE_PIXELS, shift_matrices

CONVOLUTIONS: dict[UnitName, int] = {"L1Agg": 1, "L2Agg": 2, "L3Agg": 3}
ROUNDS = 32
"""Rounds that have running statistics of their own: those of bags of up to 65 instances."""


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
        bn: over what hidden convolutions are normalised in training; None is not at all.
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
        bn: BatchNormScope | None,
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
                if bn is not None:
                    self.append(UnitNorm(out, ROUNDS if bn == "round" else 1))
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
    """``nn.BatchNorm2d`` in a recursion: ``NormPass`` takes its statistics in training.

    Folding makes values less and less spread, so each round has running statistics of its own,
    and evaluation normalises a round as training did. Rounds that training has not seen, and all
    from the last row on, use the last that it has.

    Args:
        channels: K.
        rounds: R, how many rounds have their own; 1 is plain batch normalisation.

    Attributes:
        running_mean, running_var: (R, K).
        num_batches_tracked: (R,), how often each row was moved.
    """

    def __init__(self, channels: int, rounds: int) -> None:
        super().__init__(channels)
        self.running_mean = torch.zeros(rounds, channels)
        self.running_var = torch.ones(rounds, channels)
        self.num_batches_tracked = torch.zeros(rounds, dtype=torch.int64)

    def forward(self, x: Tensor, norms: NormPass | None = None) -> Tensor:
        """(M, K, h, w) -> (M, K, h, w); without ``norms`` plain batch normalisation, of round 0."""
        if self.training and norms is not None:
            return norms.normalise(self, x)
        if self.training:  # which moves the statistics in place
            cast(Tensor, self.num_batches_tracked)[0] += 1
            mean, variance = (cast(Tensor, t)[0] for t in (self.running_mean, self.running_var))
        else:
            mean, variance = self.statistics(0 if norms is None else norms.round)
        return F.batch_norm(
            x,
            mean,
            variance,
            self.weight,
            self.bias,
            self.training,
            cast(float, self.momentum),
            self.eps,
        )

    def statistics(self, number: int) -> tuple[Tensor, Tensor]:
        """The running mean and variance (K,) that a round of this number is evaluated with."""
        seen = (cast(Tensor, self.num_batches_tracked) > 0).sum()
        row = (seen - 1).clamp(0, self.row(number))
        running = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        mean, variance = (values.index_select(0, row.view(1))[0] for values in running)
        return mean, variance

    @property
    def rounds(self) -> int:
        """R."""
        return len(cast(Tensor, self.running_mean))

    def row(self, number: int) -> int:
        """The row of a round's statistics."""
        return min(number, self.rounds - 1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any
    ) -> None:
        """Take statistics (K,) of older versions, which pooled all rounds, for every round."""
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            own = cast(Tensor, getattr(self, name))
            given = state_dict.get(prefix + name)
            if given is not None and given.shape == own.shape[1:]:
                state_dict[prefix + name] = given.expand(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class _Moments(NamedTuple):
    """Statistics of one BN layer in one round; G is 1 for scope round, the W windows for window."""

    round: int
    mean: Tensor  # (G, K)
    variance: Tensor  # (G, K), unbiased
    loop_index: Tensor  # (W,)


class NormPass:
    """BN in one pass: statistics round by round, one move of the running ones at the end.

    Attributes:
        by_window: whether each window has statistics of its own (scope window).
        round: the number of the round that is computed.
    """

    def __init__(self, scope: BatchNormScope) -> None:
        self.by_window = scope == "window"
        self.round = 0
        self._loop_index = torch.empty(0, dtype=torch.int64)
        self._moments: dict[UnitNorm, list[_Moments]] = {}

    def start_round(self, number: int, loop_index: Tensor) -> None:
        """Begin a round with windows (W,) of these numbers in the plain loop (see `Round`)."""
        self.round, self._loop_index = number, loop_index

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
        moments = mean.view(groups, K), variance.view(groups, K)
        self.record(norm, self.round, *moments, self._loop_index)
        return y.reshape(M // groups, groups, K, height, width).transpose(0, 1).reshape(x.shape)

    def record(
        self, norm: UnitNorm, number: int, mean: Tensor, variance: Tensor, loop_index: Tensor
    ) -> None:
        """Add a layer's statistics in a round; see `_Moments`."""
        mean, variance = mean.to(norm.weight.dtype), variance.to(norm.weight.dtype)
        self._moments.setdefault(norm, []).append(_Moments(number, mean, variance, loop_index))

    def finish(self) -> None:
        """Move the running statistics of every BN layer that normalised anything."""
        for norm, moments in self._moments.items():
            if self.by_window:
                _move_by_window(norm, moments)
            else:
                for each in moments:
                    _move_round(norm, each)


@torch.no_grad()
def _move_round(norm: UnitNorm, moments: _Moments) -> None:
    """One step of a round's running statistics towards its moments.

    The first steps take the mean of all so far: the start, 0 and 1, is nobody's statistics, and the
    rounds of long bags are seen seldom.
    """
    row = norm.row(moments.round)
    tracked = cast(Tensor, norm.num_batches_tracked)
    tracked[row] += 1
    share = (1 / tracked[row]).clamp(min=cast(float, norm.momentum)).to(moments.mean.dtype)
    for running, values in (
        (norm.running_mean, moments.mean),
        (norm.running_var, moments.variance),
    ):
        cast(Tensor, running)[row].lerp_(values[0], share)


@torch.no_grad()
def _move_by_window(norm: UnitNorm, rounds: list[_Moments]) -> None:
    """One step of the running statistics for each window, in the order of the reference loop."""
    order = torch.cat([m.loop_index for m in rounds]).argsort()
    means, variances = (
        torch.cat(values)[order.to(values[0].device)]
        for values in ([m.mean for m in rounds], [m.variance for m in rounds])
    )
    momentum, steps = cast(float, norm.momentum), len(means)
    kept = (1 - momentum) ** torch.arange(steps - 1, -1, -1, device=means.device, dtype=means.dtype)
    for running, moments in ((norm.running_mean, means), (norm.running_var, variances)):
        step = momentum * (kept @ moments)
        cast(Tensor, running).mul_((1 - momentum) ** steps).add_(step)
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
