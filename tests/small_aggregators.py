"""Every registered aggregator, small, and bags to aggregate."""

from __future__ import annotations

from typing import Any

import torch
from numpy_layers import shaken
from torch import Tensor

from dragn_cache.aggregators import AGGREGATORS, Aggregator, create_aggregator, options_of
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags

MAP, VECTOR = (17, 2, 3), (19,)
SIZES = [1, 2, *range(1, 14), 5, 1, 17, 23, 31, 40]
LABELS = 3
# Options that a method cannot be made without, those that keep the tests small, and those that take
# the longest way.
REQUIRED: dict[str, dict[str, Any]] = {
    name: {"labels": LABELS} for name in AGGREGATORS if "labels" in options_of(name)
} | {"bilstm": {"hidden": 29}, "dragn": {"bn": "auto"}, "hamil": {"bn": "auto"}}


def make(name: str, in_shape: tuple[int, ...], *, seed: int = 0) -> Aggregator:
    """An aggregator in evaluation mode, its parameters off their start."""
    torch.manual_seed(seed)
    aggregator = create_aggregator(name, in_shape=in_shape, **REQUIRED.get(name, {}))
    return shaken(aggregator, by=0.1).eval()


def draw(in_shape: tuple[int, ...], sizes: list[int] = SIZES, *, seed: int = 1) -> RaggedBags:
    """Non-negative features, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    return RaggedBags.from_list([torch.rand(n, *in_shape, generator=generator) for n in sizes])


def supervise(bags: int) -> Supervision:
    """Every bag has label 0, and every third of the others each."""
    targets = torch.tensor([[1.0, k % 3 == 0, k % 3 == 1] for k in range(bags)])
    return Supervision(targets, torch.nn.functional.binary_cross_entropy_with_logits)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a part of the largest entry of ``b``."""
    return float(((a - b).abs().max() / b.abs().max()).detach())
