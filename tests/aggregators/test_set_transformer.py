"""Set Transformer against the paper's formulas in NumPy, one bag at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    Array,
    Weights,
    attention,
    heads_of,
    instances_of,
    linear,
    norm,
    random_bags,
    rows_of,
    shaken,
    softmax,
    weights_of,
)

from dragn_cache.aggregators import create_aggregator
from dragn_cache.errors import InputError

WIDTH, EMBED, HEADS = 19, 12, 3
SIZES = [5, 1, 23, 2, 17]


def block(w: Weights, name: str, x: Array, y: Array) -> Array:
    """MAB(X, Y)."""
    q, k, v = linear(w, f"{name}.q", x), linear(w, f"{name}.k", y), linear(w, f"{name}.v", y)
    h = norm(w, f"{name}.norm1", q + attention(q, k, v, HEADS, EMBED**-0.5))
    return norm(w, f"{name}.norm2", h + np.maximum(linear(w, f"{name}.o", h), 0))


@pytest.mark.parametrize(("inducing", "layers"), [(None, 1), (None, 3), (7, 1), (5, 2)])
def test_it_is_what_the_paper_says(inducing: int | None, layers: int) -> None:
    options: dict[str, Any] = {"embed": EMBED, "heads": HEADS, "layers": layers}
    torch.manual_seed(2)
    model = create_aggregator("set_transformer", in_shape=(WIDTH,), inducing=inducing, **options)
    w, bags = weights_of(shaken(model)), random_bags(SIZES, WIDTH)
    result = model(bags)
    assert model.out_dim == EMBED
    for bag, x in enumerate(instances_of(bags)):
        for layer in range(layers):
            name = f"encoder.{layer}"
            if inducing is None:
                x = block(w, f"{name}.block", x, x)
            else:
                gathered = block(w, f"{name}.gather", w[f"{name}.inducing"], x)
                x = block(w, f"{name}.spread", x, gathered)
        seed = w["seed"]
        expected = block(w, "pool", seed, x)[0]
        np.testing.assert_allclose(result.embedding[bag].detach(), expected, rtol=1e-4, atol=1e-5)
        q, k = linear(w, "pool.q", seed), linear(w, "pool.k", x)
        parts = zip(heads_of(q, HEADS), heads_of(k, HEADS), strict=True)
        weights = np.mean([softmax(a @ b.T / EMBED**0.5)[0] for a, b in parts], 0)
        np.testing.assert_allclose(
            result.attention[rows_of(bags, bag)].detach(), weights, rtol=1e-3, atol=1e-6
        )


def test_the_attention_of_a_bag_adds_up_to_one() -> None:
    bags = random_bags(SIZES, WIDTH)
    attention = create_aggregator("set_transformer", in_shape=(WIDTH,))(bags).attention
    for bag in range(len(SIZES)):
        total = attention[rows_of(bags, bag)].sum()
        torch.testing.assert_close(total, torch.tensor(1.0))


def test_the_order_does_not_matter_with_inducing_points_either() -> None:
    torch.manual_seed(2)
    model = create_aggregator("set_transformer", in_shape=(WIDTH,), inducing=7)
    bags = random_bags(SIZES, WIDTH)
    shuffled = bags.permuted(torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        model(shuffled).embedding, model(bags).embedding, rtol=1e-4, atol=1e-5
    )
    gradients = torch.autograd.grad(model(bags).embedding.square().sum(), list(model.parameters()))
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": 0}, "option embed: expected a whole number of at least 1, got 0"),
        ({"heads": 2.0}, r"option heads: expected a whole number of at least 1, got 2\.0"),
        ({"layers": True}, "option layers: expected a whole number of at least 1, got True"),
        ({"inducing": 0}, "option inducing: expected a whole number of at least 1, got 0"),
        (
            {"embed": 13, "heads": 3},
            "option embed: expected a multiple of heads, 3, got 13; give embed=12",
        ),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("set_transformer", in_shape=(WIDTH,), **options)
