"""DRAGN's recursion as the paper's plain loop, and random aggregators and bags to compare on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dragn_cache.aggregators import create_aggregator
from dragn_cache.aggregators.dragn import Dragn
from dragn_cache.devices import one_thread
from dragn_cache.machine import find_compiler
from dragn_cache.ragged import RaggedBags

SIZES = [4, 13, 1, 9, 2, 3, 12, 5, 8, 6, 11, 7, 10]  # each of 1..13, no two of a parity adjacent
Unit = Callable[[Tensor], Tensor]

needs_compiler = pytest.mark.skipif(
    find_compiler() is None, reason="needs a C++ compiler; PyTorch computes without"
)


def dragn(in_shape: tuple[int, ...], *, seed: int = 0, **options: Any) -> Dragn:
    torch.manual_seed(seed)
    aggregator = create_aggregator("dragn", in_shape=in_shape, **options)
    assert isinstance(aggregator, Dragn)
    return aggregator


def random_dragn(in_shape: tuple[int, ...], **options: Any) -> Dragn:
    """With PyTorch's random start, and BN weights and statistics that are not all 0 or 1."""
    aggregator = dragn(in_shape, init="default", **options)
    draw_statistics(norms_of(aggregator))
    return aggregator


def draw_statistics(norms: Sequence[nn.BatchNorm2d]) -> None:
    """BN weights and statistics that are not all 0 or 1, of the first four rounds."""
    for norm in norms:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            nn.init.uniform_(tensor, 0.5, 1.5)
        assert norm.num_batches_tracked is not None
        if len(norm.num_batches_tracked) > 1:
            norm.num_batches_tracked[:4] = 1


class RoundNorm(nn.Module):
    """Batch normalisation in evaluation by the statistics of a round, or of the last that has any.

    Attributes:
        number: of the round that is computed.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach().clone())
        self.bias = nn.Parameter(norm.bias.detach().clone())
        self.number = 0
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer.clone())

    def forward(self, x: Tensor) -> Tensor:
        row = min(self.number, int(self.num_batches_tracked.count_nonzero()) - 1)
        mean, variance = self.running_mean[row], self.running_var[row]
        return nn.functional.batch_norm(x, mean, variance, self.weight, self.bias)


def at_round(layers: nn.Module, number: int) -> nn.Module:
    """The layers, whose batch normalisation now is that of a round."""
    for layer in layers.modules():
        if isinstance(layer, RoundNorm):
            layer.number = number
    return layers


def norms_of(aggregator: Dragn) -> list[nn.BatchNorm2d]:
    return [m for m in aggregator.modules() if isinstance(m, nn.BatchNorm2d)]


def draw(
    in_shape: tuple[int, ...], sizes: list[int] = SIZES, dtype: torch.dtype = torch.float32
) -> RaggedBags:
    """The same values in every dtype, but for its rounding."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(sizes), *in_shape, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, *accumulate(sizes)])
    return RaggedBags(rows.to(dtype), offsets)


def algorithm_1(bags: RaggedBags, unit_of_round: Callable[[int], Unit], mixing: str) -> Tensor:
    """The paper's loop: bag by bag, round by round, window by window. (B, C)"""
    embeddings = []
    for b in range(len(bags)):
        bag = bags.bag(b)
        o = list(bag if bag.dim() == 4 else bag[:, :, None, None])
        number = 0
        while len(o) > 2:
            unit, folded = unit_of_round(number), []
            for j in range(len(o) - 2):
                window = torch.stack([o[j], o[j + 1], o[j + 2]], dim=1)  # (C, 3, h, w)
                if mixing == "shared":
                    folded.append(unit(window)[:, 0])
                else:
                    folded.append(unit(window.reshape(1, -1, *window.shape[2:]))[0])
            o, number = folded, number + 1
        result = o[0] if len(o) == 1 else (o[0] + o[1]) / 2
        embeddings.append(result.mean((1, 2)))
    return torch.stack(embeddings)


def plain_copy(unit: nn.Module) -> nn.Sequential:
    """The same layers as PyTorch's own modules, with copies of parameters and statistics.

    Batch normalisation with statistics for each round is a `RoundNorm`, for evaluation.
    """
    layers: list[nn.Module] = []
    for layer in unit.children():
        own: nn.Module
        if isinstance(layer, nn.Conv2d):
            own = nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                padding=layer.padding,  # type: ignore[arg-type]
                groups=layer.groups,
            )
            own.load_state_dict(layer.state_dict())
        elif isinstance(layer, nn.BatchNorm2d):
            own = plain_norm(layer)
        else:
            own = nn.ReLU()
        layers.append(own)
    return nn.Sequential(*layers).to(next(unit.parameters()).dtype).train(unit.training)


def plain_norm(norm: nn.BatchNorm2d) -> nn.Module:
    """PyTorch's own layer with the same statistics, where all rounds share them."""
    state = norm.state_dict()
    if len(state["running_mean"]) > 1:
        return RoundNorm(norm)
    own = nn.BatchNorm2d(norm.num_features)
    buffers = {name for name, _ in norm.named_buffers()}
    own.load_state_dict({name: x[0] if name in buffers else x for name, x in state.items()})
    return own


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Equal to within ``tolerance`` of the largest entry."""
    assert a.shape == b.shape
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def assert_like_the_loop(
    aggregator: Dragn, bags: RaggedBags, *, mixing: str = "shared", values: float, gradients: float
) -> None:
    """Values, gradients of features and parameters, and BN statistics, against ``algorithm_1``."""
    plain = [plain_copy(unit) for unit in aggregator.units]
    features = bags.values.clone().requires_grad_()
    loop_features = bags.values.clone().requires_grad_()
    ours = aggregator(RaggedBags(features, bags.offsets)).embedding
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(ours.dtype)
    (ours * weight).sum().backward()
    with one_thread():  # thousands of tiny convolutions
        loop = algorithm_1(
            RaggedBags(loop_features, bags.offsets),
            lambda number: at_round(plain[min(number, len(plain) - 1)], number),
            mixing,
        )
        (loop * weight).sum().backward()
    assert close(ours, loop, values)
    assert features.grad is not None
    assert loop_features.grad is not None
    assert close(features.grad, loop_features.grad, gradients)
    for unit, copy in zip(aggregator.units, plain, strict=True):
        expected = dict(copy.named_parameters())
        for name, parameter in unit.named_parameters():
            grad = expected[name].grad
            assert (parameter.grad is None) == (grad is None), name
            if grad is not None:
                assert parameter.grad is not None
                largest = max(float(p.grad.abs().max()) for p in copy.parameters())  # type: ignore[union-attr]
                assert (parameter.grad - grad).abs().max() <= gradients * largest, name
        buffers = dict(copy.named_buffers())
        for name, buffer in unit.named_buffers():
            theirs = buffers[name].double().view(buffer.shape)
            assert close(buffer.double(), theirs, values), name


def assert_moved(norm: nn.BatchNorm2d, before: RoundNorm, seen: Sequence[Tensor]) -> None:
    """The statistics of each round, the second time that they are moved, from the values (K, …)."""
    own = RoundNorm(norm)
    for row, values in enumerate(seen):
        mean, variance = values.mean(1), values.var(1)
        torch.testing.assert_close(own.running_mean[row], (before.running_mean[row] + mean) / 2)
        torch.testing.assert_close(own.running_var[row], (before.running_var[row] + variance) / 2)
    count = len(seen)
    assert torch.equal(own.running_mean[count:], before.running_mean[count:])
    assert own.num_batches_tracked[:5].tolist() == [2] * count + [1] * (4 - count) + [0]
