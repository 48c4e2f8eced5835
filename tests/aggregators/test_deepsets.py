"""Deep Sets against its formula in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    assert_close,
    check_gradients,
    instances_of,
    random_bags,
    relu_network,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.errors import InputError
from dragn_cache.ragged.bags import joined

WIDTH = 19
SIZES = [5, 1, 13, 2, 3]
every_pool = pytest.mark.parametrize("pool", ["sum", "mean", "max"])


def make(**options: Any) -> Aggregator:
    torch.manual_seed(3)
    return create_aggregator("deepsets", in_shape=(WIDTH,), **options).eval()


@every_pool
@pytest.mark.parametrize(
    ("embed", "after", "width"),
    [((), (), WIDTH), (11, (), 11), ((), 7, 7), (11, 7, 7), ((23, 11), (13, 7), 7)],
)
def test_it_is_what_the_paper_says(pool: str, embed: Any, after: Any, width: int) -> None:
    deepsets, bags = make(pool=pool, embed=embed, after=after), random_bags(SIZES, WIDTH)
    w = weights_of(deepsets)
    result = deepsets(bags)
    assert deepsets.out_dim == width
    assert result.attention is None
    for k, h in enumerate(instances_of(bags)):
        pooled = getattr(np, pool)(relu_network(w, "phi", h), 0)
        assert_close(result.embedding[k], relu_network(w, "rho", pooled))


@every_pool
def test_only_the_sum_tells_a_bag_from_the_same_bag_twice(pool: str) -> None:
    deepsets, bags = make(pool=pool, embed=11, after=7), random_bags([5], WIDTH)
    twice = type(bags).from_list([torch.cat((bags.values, bags.values))])
    once, doubled = deepsets(joined([bags, twice])).embedding
    assert torch.allclose(once, doubled, rtol=1e-5, atol=1e-6) == (pool != "sum")


@every_pool
def test_every_parameter_learns(pool: str) -> None:
    deepsets = make(pool=pool, embed=(23, 11), after=(13, 7))
    check_gradients(deepsets, deepsets(random_bags(SIZES, WIDTH)).embedding.square().sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": 0}, "option embed: expected one width or several, .*, got 0"),
        ({"after": (3, -1)}, r"option after: expected one width or several, .*, got \(3, -1\)"),
        ({"pool": "median"}, "option pool: expected sum, mean or max, got 'median'"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)
