"""ImPLoc against the transformer's formulas in NumPy, and against PyTorch's own encoder layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    attention,
    instances_of,
    linear,
    norm,
    random_bags,
    shaken,
    weights_of,
)
from torch import nn

from dragn_cache.aggregators import create_aggregator
from dragn_cache.errors import InputError

WIDTH, EMBED, HEADS, HEAD_DIM = 19, 11, 3, 5
SIZES = [5, 1, 23, 2, 17]


@pytest.mark.parametrize("readout", ["mean", "cls"])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_is_what_the_paper_says(readout: str, layers: int) -> None:
    options = {"embed": EMBED, "heads": HEADS, "head_dim": HEAD_DIM, "layers": layers}
    torch.manual_seed(2)
    model = create_aggregator("imploc", in_shape=(WIDTH,), readout=readout, **options)
    w, bags = weights_of(shaken(model)), random_bags(SIZES, WIDTH)
    result = model(bags)
    assert (result.attention, model.out_dim) == (None, EMBED)
    for bag, x in enumerate(instances_of(bags)):
        x = linear(w, "embed", x)
        if readout == "cls":
            x = np.concatenate((w["cls"][None], x))
        for layer in range(layers):
            name = f"layers.{layer}"
            q, k, v = np.split(linear(w, f"{name}.qkv", x), 3, 1)
            mixed = linear(w, f"{name}.o", attention(q, k, v, HEADS, HEAD_DIM**-0.5))
            h = norm(w, f"{name}.norm1", x + mixed)
            wide = np.maximum(linear(w, f"{name}.widen", h), 0)
            assert wide.shape[1] == 4 * EMBED
            x = norm(w, f"{name}.norm2", h + linear(w, f"{name}.narrow", wide))
        expected = x.mean(0) if readout == "mean" else x[0]
        np.testing.assert_allclose(result.embedding[bag].detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_is_pytorchs_where_heads_share_the_width() -> None:
    torch.manual_seed(2)
    model = create_aggregator("imploc", in_shape=(WIDTH,), embed=12, heads=3, head_dim=4, layers=1)
    state, bags = shaken(model).state_dict(), random_bags(SIZES, WIDTH)
    theirs = nn.TransformerEncoderLayer(12, 3, 48, dropout=0.0, batch_first=True)
    names = {"linear1": "widen", "linear2": "narrow", "norm1": "norm1", "norm2": "norm2"}
    copied = {
        f"{their}.{part}": state[f"layers.0.{our}.{part}"]
        for their, our in names.items()
        for part in ("weight", "bias")
    }
    copied["self_attn.in_proj_weight"] = state["layers.0.qkv.weight"]
    copied["self_attn.out_proj.weight"] = state["layers.0.o.weight"]
    copied["self_attn.in_proj_bias"], copied["self_attn.out_proj.bias"] = (
        torch.zeros(36),
        torch.zeros(12),
    )
    theirs.load_state_dict(copied)
    result = model(bags).embedding
    for bag in range(len(SIZES)):
        x = nn.functional.linear(bags.bag(bag), state["embed.weight"], state["embed.bias"])
        torch.testing.assert_close(theirs(x[None])[0].mean(0), result[bag], rtol=1e-4, atol=1e-5)


def test_reading_a_class_token_keeps_the_laws_too() -> None:
    torch.manual_seed(2)
    model, bags = (
        create_aggregator("imploc", in_shape=(WIDTH,), embed=12, readout="cls"),
        random_bags(SIZES, WIDTH),
    )
    together = model(bags).embedding
    for bag in range(len(SIZES)):
        alone = model(bags.select([bag])).embedding[0]
        torch.testing.assert_close(alone, together[bag], rtol=1e-5, atol=1e-6)
    shuffled = model(bags.permuted(torch.Generator().manual_seed(3))).embedding
    torch.testing.assert_close(shuffled, together, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(together.square().sum(), list(model.parameters()))
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": 0}, "option embed: expected a whole number of at least 1, got 0"),
        ({"heads": 2.0}, r"option heads: expected a whole number of at least 1, got 2\.0"),
        ({"head_dim": -1}, "option head_dim: expected a whole number of at least 1, got -1"),
        ({"layers": True}, "option layers: expected a whole number of at least 1, got True"),
        ({"readout": "last"}, "option readout: expected mean or cls, got 'last'"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("imploc", in_shape=(WIDTH,), **options)
