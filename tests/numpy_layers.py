"""A network's layers in NumPy, float64, one bag at a time, for tests to compare with."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dragn_cache.ragged import RaggedBags

Array = NDArray[Any]
Weights = dict[str, Array]
Module = TypeVar("Module", bound=nn.Module)


# Bags and modules


def random_bags(
    sizes: list[int], *shape: int, seed: int = 1, dtype: torch.dtype = torch.float32
) -> RaggedBags:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, *shape, generator=generator, dtype=dtype) for n in sizes]
    return RaggedBags.from_list(rows)


def instances_of(bags: RaggedBags) -> list[Array]:
    """Each bag's instances (n, …)."""
    return [bags.bag(k).double().numpy() for k in range(len(bags))]


def rows_of(bags: RaggedBags, k: int) -> slice:
    """Which of all bags' rows are bag k's."""
    return slice(*bags.offsets[k : k + 2].tolist())


def shaken(module: Module, *, by: float = 0.2, seed: int = 3) -> Module:
    """The module with every parameter moved, so that no norm or bias is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module


def weights_of(module: nn.Module) -> Weights:
    """Parameters and buffers by their names in the ``state_dict``."""
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def part(w: Weights, prefix: str) -> Weights:
    """The weights whose names begin so, by the rest of the name."""
    return {name.removeprefix(prefix): v for name, v in w.items() if name.startswith(prefix)}


# Functions


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def softmax(x: Array, axis: int = -1) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis, keepdims=True))


def unit(x: Array) -> Array:
    """Rows scaled to length 1."""
    return np.asarray(x / np.sqrt((x**2).sum(-1, keepdims=True)))


def binary_loss(logits: Array, targets: Array) -> float:
    """Mean binary cross-entropy of logits."""
    p = sigmoid(logits)
    return float(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean())


# Layers, by their names in the weights


def linear(w: Weights, layer: str, x: Array) -> Array:
    return np.asarray(x @ w[f"{layer}.weight"].T + w.get(f"{layer}.bias", 0))


def norm(w: Weights, layer: str, x: Array) -> Array:
    """Layer normalisation."""
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return np.asarray(scaled * w[f"{layer}.weight"] + w[f"{layer}.bias"])


def relu_network(w: Weights, name: str, x: Array) -> Array:
    """Linear layers ``name.0``, ``name.2``, … with a ReLU after each, as many as there are."""
    layer = 0
    while f"{name}.{layer}.weight" in w:
        x, layer = np.maximum(linear(w, f"{name}.{layer}", x), 0), layer + 2
    return x


def gated(w: Weights, name: str, h: Array) -> Array:
    """Gated attention scores (n, K)."""
    hidden = np.tanh(linear(w, f"{name}.V", h)) * sigmoid(linear(w, f"{name}.U", h))
    return linear(w, f"{name}.w", hidden)


def heads_of(x: Array, heads: int) -> list[Array]:
    return np.split(x, heads, axis=1)


def attention(q: Array, k: Array, v: Array, heads: int, scale: float) -> Array:
    """(n, D), (m, D), (m, D): each head by itself, side by side."""
    parts = zip(heads_of(q, heads), heads_of(k, heads), heads_of(v, heads), strict=True)
    return np.concatenate([softmax(scale * a @ b.T) @ c for a, b, c in parts], 1)


def lstm(w: Weights, end: str, x: Array) -> Array:
    """States of one direction of one layer (n, D); PyTorch's order of the gates: i, f, g, o."""
    hidden = w[f"weight_hh_{end}"].shape[1]
    h, c, states = np.zeros(hidden), np.zeros(hidden), []
    for step in x[::-1] if end.endswith("reverse") else x:
        gates = w[f"weight_ih_{end}"] @ step + w[f"bias_ih_{end}"]
        gates = gates + w[f"weight_hh_{end}"] @ h + w[f"bias_hh_{end}"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.stack(states[::-1] if end.endswith("reverse") else states)


def gru(w: Weights, end: str, x: Array) -> Array:
    """The same for a GRU; gates r, z, n."""
    h, states = np.zeros(w[f"weight_hh_{end}"].shape[1]), []
    for step in x[::-1] if end.endswith("reverse") else x:
        of_x = np.split(w[f"weight_ih_{end}"] @ step + w[f"bias_ih_{end}"], 3)
        of_h = np.split(w[f"weight_hh_{end}"] @ h + w[f"bias_hh_{end}"], 3)
        r, z = sigmoid(of_x[0] + of_h[0]), sigmoid(of_x[1] + of_h[1])
        h = (1 - z) * np.tanh(of_x[2] + r * of_h[2]) + z * h
        states.append(h)
    return np.stack(states[::-1] if end.endswith("reverse") else states)


# Checks


def check_gradients(module: nn.Module, loss: Tensor) -> None:
    """Every parameter gets a gradient that is finite and not 0 everywhere."""
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def assert_close(got: Tensor, expected: Any) -> None:
    """Equal to within the rounding of the tensor's precision."""
    rtol, atol = (1e-6, 1e-8) if got.dtype == torch.float64 else (1e-4, 1e-6)
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=rtol, atol=atol)
