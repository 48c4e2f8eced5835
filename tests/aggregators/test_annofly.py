"""AnnoFly's attention over the states of a recurrent network, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    assert_close,
    gru,
    instances_of,
    linear,
    lstm,
    part,
    random_bags,
    rows_of,
    shaken,
    softmax,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.errors import InputError

WIDTH = 19
SIZES = [5, 1, 13, 2, 3]


def make(**options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    return shaken(create_aggregator("annofly", in_shape=(WIDTH,), **options)).double().eval()


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_annofly_attends_to_states(cell: str, bidirectional: bool) -> None:
    options = {"cell": cell, "bidirectional": bidirectional, "hidden": 11, "attn_dim": 7}
    annofly, bags = make(**options), random_bags(SIZES, WIDTH, dtype=torch.float64)
    w, result = weights_of(annofly), annofly(bags)
    own, run = part(w, "rnn."), {"gru": gru, "lstm": lstm}[cell]
    for k, x in enumerate(instances_of(bags)):
        ends = ["l0", "l0_reverse"] if bidirectional else ["l0"]
        h = np.hstack([run(own, end, x) for end in ends])
        a = softmax(np.tanh(linear(w, "W", h)) @ w["v.weight"][0])
        np.testing.assert_allclose(result.attention[rows_of(bags, k)].detach(), a, rtol=1e-9)
        assert_close(result.embedding[k], a @ h)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "rnn"}, "option cell: expected gru or lstm, got 'rnn'"),
        ({"hidden": 0}, "option hidden: .* got 0"),
        ({"bidirectional": 0}, "option bidirectional: .* got 0"),
        ({"attn_dim": 0}, "option attn_dim: .* got 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("annofly", in_shape=(WIDTH,), **options)
