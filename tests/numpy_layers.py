"""A network's layers in NumPy, from its state_dict, for tests that compute one bag at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.ragged import RaggedBags

Array = NDArray[np.float64]
State = dict[str, Array]


def state_of(module: torch.nn.Module) -> State:
    return {key: value.double().numpy() for key, value in module.state_dict().items()}


def linear(state: State, layer: str, x: Array) -> Array:
    result: Array = x @ state[f"{layer}.weight"].T + state.get(f"{layer}.bias", 0)
    return result


def relu_network(state: State, name: str, x: Array) -> Array:
    """Linear layers ``name.0``, ``name.2``, … with a ReLU after each, as many as there are."""
    layer = 0
    while f"{name}.{layer}.weight" in state:
        x, layer = np.maximum(linear(state, f"{name}.{layer}", x), 0), layer + 2
    return x


def gated(state: State, name: str, h: Array) -> Array:
    """Gated attention scores (n, K)."""
    hidden = np.tanh(linear(state, f"{name}.V", h)) / (1 + np.exp(-linear(state, f"{name}.U", h)))
    return linear(state, f"{name}.w", hidden)


def softmax(scores: Array, axis: int = 0) -> Array:
    powers = np.exp(scores)
    result: Array = powers / powers.sum(axis, keepdims=True)
    return result


def binary_loss(logits: Array, targets: Array) -> float:
    """Mean binary cross-entropy of logits."""
    p = 1 / (1 + np.exp(-logits))
    return float(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean())


def random_bags(sizes: list[int], *shape: int) -> RaggedBags:
    generator = torch.Generator().manual_seed(1)
    return RaggedBags.from_list([torch.randn(n, *shape, generator=generator) for n in sizes])


def instances_of(bags: RaggedBags) -> list[Array]:
    return [bags.bag(k).double().numpy() for k in range(len(bags))]


def rows_of(bags: RaggedBags, k: int) -> slice:
    """Which rows are bag k's."""
    return slice(*bags.offsets[k : k + 2].tolist())


def check_gradients(module: torch.nn.Module, loss: torch.Tensor) -> None:
    """Every parameter gets a gradient that is finite and not 0 everywhere."""
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def assert_close(got: torch.Tensor, expected: Any) -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
