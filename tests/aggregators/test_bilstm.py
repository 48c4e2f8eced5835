"""BiLSTM against its formulas in NumPy, one step at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    assert_close,
    instances_of,
    linear,
    lstm,
    part,
    random_bags,
    shaken,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.errors import InputError

WIDTH = 19
SIZES = [5, 1, 13, 2, 3]


def make(**options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    return shaken(create_aggregator("bilstm", in_shape=(WIDTH,), **options)).double().eval()


@pytest.mark.parametrize("readout", ["mean", "ends"])
def test_bilstm_reads_a_bag_both_ways(readout: str) -> None:
    bilstm, bags = make(hidden=11, readout=readout), random_bags(SIZES, WIDTH, dtype=torch.float64)
    w, embedding = weights_of(bilstm), bilstm(bags).embedding
    own = part(w, "lstm.")
    for k, x in enumerate(instances_of(bags)):
        for layer in ("l0", "l1"):
            x = np.hstack([lstm(own, layer, x), lstm(own, f"{layer}_reverse", x)])
        if readout == "ends":
            x = np.hstack([x[-1, :11], x[0, 11:]])[None]
        steps = np.maximum(linear(w, "project.1", x), 0)
        assert_close(embedding[k], steps.mean(0))


def test_bilstm_drops_in_training_only() -> None:
    bilstm, bags = make(hidden=11), random_bags(SIZES, WIDTH, dtype=torch.float64)
    evaluated = bilstm(bags).embedding
    torch.manual_seed(7)
    first, second = bilstm.train()(bags).embedding, bilstm(bags).embedding
    assert not torch.equal(first, second)
    assert not torch.equal(first, evaluated)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, "option hidden: .* got 0"),
        ({"readout": "last"}, "option readout: expected mean or ends, got 'last'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("bilstm", in_shape=(WIDTH,), **options)
