"""NAN against its formulas in NumPy."""

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
    rows_of,
    shaken,
    softmax,
    unit,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.errors import InputError

WIDTH = 19
SIZES = [5, 1, 13, 2, 3]


def make(**options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    return shaken(create_aggregator("nan", in_shape=(WIDTH,), **options)).double().eval()


@pytest.mark.parametrize("unit_length", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_nan_attends_and_attends_again(blocks: int, unit_length: bool) -> None:
    nan = make(blocks=blocks, unit_length=unit_length)
    bags = random_bags(SIZES, WIDTH, dtype=torch.float64)
    w, result = weights_of(nan), nan(bags)
    for k, rows in enumerate(instances_of(bags)):
        f = unit(rows) if unit_length else rows
        a = softmax(f @ w["q0"])
        if blocks == 2:
            a = softmax(f @ np.tanh(linear(w, "W", a @ f)))
        np.testing.assert_allclose(result.attention[rows_of(bags, k)].detach(), a)
        assert_close(result.embedding[k], a @ f)


def test_nan_starts_as_the_mean_and_unsaturated() -> None:
    bags = random_bags(SIZES, 512, dtype=torch.float64)
    nan = create_aggregator("nan", in_shape=(512,), blocks=1).double()
    assert_close(nan(bags).embedding, [rows.mean(0) for rows in instances_of(bags)])
    weight = create_aggregator("nan", in_shape=(512,)).get_parameter("W.weight")
    assert 0.95 < float(weight.detach().std()) * 512**0.5 < 1.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 3}, "option blocks: expected 1 or 2, got 3"),
        ({"unit_length": None}, "option unit_length: .* got None"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("nan", in_shape=(WIDTH,), **options)
