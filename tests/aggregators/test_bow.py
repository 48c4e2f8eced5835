"""Bag of words against its formula in NumPy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy_layers import (
    assert_close,
    instances_of,
    linear,
    random_bags,
    shaken,
    softmax,
    unit,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.errors import InputError

WIDTH = 19
SIZES = [5, 1, 13, 2, 3]


def make(in_shape: tuple[int, ...] = (WIDTH,), **options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    return shaken(create_aggregator("bow", in_shape=in_shape, **options)).double().eval()


def test_bow_counts_words_in_all_pixels() -> None:
    bags = random_bags(SIZES, WIDTH, 2, 3, dtype=torch.float64)
    bow = make((WIDTH, 2, 3), clusters=7)
    w = weights_of(bow)
    assert bow.out_dim == 7
    expected = []
    for maps in instances_of(bags):
        words = maps.transpose(0, 2, 3, 1).reshape(-1, WIDTH)
        counts = softmax(linear(w, "assign", words)).sum(0)
        expected.append(unit(counts))
    assert_close(bow(bags).embedding, expected)


def test_options_are_checked() -> None:
    message = "option clusters: expected a whole number of at least 2, got 1"
    with pytest.raises(InputError, match=message):
        create_aggregator("bow", in_shape=(WIDTH,), clusters=1)
