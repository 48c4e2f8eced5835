"""DRAGN's recursion as the paper's plain loop, and random aggregators and bags to compare on."""

from __future__ import annotations

from collections.abc import Callable
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
    for norm in norms_of(aggregator):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            nn.init.uniform_(tensor, 0.5, 1.5)
    return aggregator


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
    """The same layers as PyTorch's own modules, with copies of parameters and statistics."""
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
        elif isinstance(layer, nn.BatchNorm2d):
            own = nn.BatchNorm2d(layer.num_features)
        else:
            own = nn.ReLU()
        layers.append(own)
    plain = nn.Sequential(*layers).to(next(unit.parameters()).dtype)
    plain.load_state_dict(unit.state_dict())
    return plain.train(unit.training)


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
            lambda number: plain[min(number, len(plain) - 1)],
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
            assert close(buffer.double(), buffers[name].double(), values), name
