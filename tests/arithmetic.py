"""A transformer's parts in NumPy, float64, one bag at a time, for tests to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Array = NDArray[Any]


class Weights:
    """A module's parameters, by layer name."""

    def __init__(self, module: nn.Module) -> None:
        self.of = {k: v.detach().double().numpy() for k, v in module.state_dict().items()}

    def linear(self, layer: str, x: Array) -> Array:
        return x @ self.of[f"{layer}.weight"].T + self.of.get(f"{layer}.bias", 0)

    def norm(self, layer: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return unit * self.of[f"{layer}.weight"] + self.of[f"{layer}.bias"]


def shaken(module: nn.Module, *, seed: int = 3) -> nn.Module:
    """The module with every parameter moved, so that no norm or bias is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def softmax(x: Array, axis: int = -1) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def heads_of(x: Array, heads: int) -> list[Array]:
    return np.split(x, heads, axis=1)


def attention(q: Array, k: Array, v: Array, heads: int, scale: float) -> Array:
    """(n, D), (m, D), (m, D): each head by itself, side by side."""
    parts = zip(heads_of(q, heads), heads_of(k, heads), heads_of(v, heads), strict=True)
    return np.concatenate([softmax(scale * a @ b.T) @ c for a, b, c in parts], 1)
