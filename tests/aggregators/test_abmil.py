"""ABMIL against the paper's formulas in NumPy, and against torchmil's with the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    assert_close,
    instances_of,
    linear,
    random_bags,
    relu_network,
    rows_of,
    sigmoid,
    softmax,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags

WIDTH, ATTENTION = 19, 7
SIZES = [5, 1, 13, 2, 3]
FORMS = ["abmil", "gated_abmil"]
every_form = pytest.mark.parametrize("name", FORMS)


def make(name: str, in_shape: tuple[int, ...] = (WIDTH,), **options: Any) -> Aggregator:
    torch.manual_seed(3)
    return create_aggregator(name, in_shape=in_shape, attn_dim=ATTENTION, **options)


@every_form
@pytest.mark.parametrize("embed", [(), (11,), (23, 11)])
def test_it_is_what_the_paper_says(name: str, embed: tuple[int, ...]) -> None:
    aggregator, bags = make(name, embed=embed), random_bags(SIZES, WIDTH)
    w, result = weights_of(aggregator), aggregator(bags)
    assert aggregator.out_dim == (WIDTH, *embed)[-1]
    for k, x in enumerate(instances_of(bags)):
        h = relu_network(w, "embed", x)
        hidden = np.tanh(linear(w, "V", h))
        if name == "gated_abmil":
            hidden = hidden * sigmoid(linear(w, "U", h))
        a = softmax(linear(w, "w", hidden)[:, 0])
        np.testing.assert_allclose(result.attention[rows_of(bags, k)].detach(), a, rtol=1e-5)
        assert_close(result.embedding[k], a @ h)


@every_form
def test_it_equals_torchmils_with_the_same_weights(name: str) -> None:
    models = pytest.importorskip("torchmil.models", reason="torchmil is not installed")
    ours, bags = make(name), random_bags(SIZES, WIDTH)
    head = torch.nn.Linear(WIDTH, 1)
    theirs = models.ABMIL(in_shape=(WIDTH,), att_dim=ATTENTION, gated=name == "gated_abmil")
    state = ours.state_dict()
    copied = {
        "pool.fc1.module.weight": state["V.weight"],
        "pool.fc1.module.bias": state["V.bias"],
        "pool.fc2.weight": state["w.weight"],
        "classifier.module.weight": head.weight,
        "classifier.module.bias": head.bias,
    }
    if name == "gated_abmil":
        copied |= {f"pool.fc_gated.module.{p}": state[f"U.{p}"] for p in ("weight", "bias")}
    theirs.load_state_dict(copied)
    padded = torch.zeros(len(SIZES), max(SIZES), WIDTH)
    mask = torch.zeros(len(SIZES), max(SIZES))
    for k, size in enumerate(SIZES):
        padded[k, :size], mask[k, :size] = bags.bag(k), 1
    logits, scores = theirs(padded, mask, return_att=True)
    result = ours(bags)
    torch.testing.assert_close(head(result.embedding)[:, 0], logits, rtol=1e-5, atol=1e-6)
    attention = scores.masked_fill(mask == 0, -torch.inf).softmax(1)[mask == 1]
    torch.testing.assert_close(result.attention, attention, rtol=1e-5, atol=1e-7)


@every_form
def test_maps_are_averaged_first(name: str) -> None:
    maps = random_bags(SIZES, WIDTH, 2, 3)
    vectors = RaggedBags(maps.values.mean((2, 3)), maps.offsets)
    from_maps = make(name, (WIDTH, 2, 3))(maps)
    torch.testing.assert_close(from_maps.embedding, make(name)(vectors).embedding)


@every_form
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_dim": 0}, "option attn_dim: expected a whole number of at least 1, got 0"),
        ({"attn_dim": True}, "option attn_dim: expected a whole number of at least 1, got True"),
        ({"embed": 0}, "option embed: expected one width or several, .*, got 0"),
        (
            {"embed": (64, 2.5)},
            r"option embed: expected one width or several, .* got \(64, 2\.5\)",
        ),
        ({"embed": 0.5}, r"option embed: expected one width or several, .*, got 0\.5"),
        ({"embed": "wide"}, "option embed: expected one width or several, .*, got 'wide'"),
    ],
)
def test_widths_that_are_none_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator(name, in_shape=(WIDTH,), **options)
