"""SPoC against its formula in NumPy, and what it learns from the training bags."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import assert_close, instances_of, random_bags, shaken, unit

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags

WIDTH = 19
SIZES = [5, 1, 13, 2, 3]


def make(in_shape: tuple[int, ...] = (WIDTH,), **options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    return shaken(create_aggregator("spoc", in_shape=in_shape, **options)).double().eval()


def test_spoc_weighs_pixels_by_their_distance_from_the_centre() -> None:
    height, width = 4, 7
    bags = random_bags(SIZES, WIDTH, height, width, dtype=torch.float64)
    y, x = np.mgrid[:height, :width]
    prior = np.exp(-((y - 1.5) ** 2 + (x - 3) ** 2) / (2 * (4 / 6) ** 2))
    for spatial_prior, weight in ((True, prior), (False, np.ones_like(prior))):
        spoc = make((WIDTH, height, width), spatial_prior=spatial_prior)
        expected = [unit((maps * weight).sum((0, 2, 3))) for maps in instances_of(bags)]
        assert_close(spoc(bags).embedding, expected)


def test_spoc_of_vectors_and_of_nothing() -> None:
    bags = RaggedBags.from_list([torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(3, 2)])
    for options in ({}, {"whiten": 2}):
        embedding = create_aggregator("spoc", in_shape=(2,), **options)(bags).embedding
        assert_close(embedding.double(), [[0.6, 0.8], [0, 0]])


def test_spoc_whitens_by_the_training_bags() -> None:
    training = random_bags([2, 3, 1] * 11, WIDTH, dtype=torch.float64)
    bags = random_bags(SIZES, WIDTH, seed=5, dtype=torch.float64)
    spoc = make(whiten=7)
    spoc.fit(training.between(k, k + 3) for k in range(0, 33, 3))
    known = np.stack([unit(rows.sum(0)) for rows in instances_of(training)])
    variance, axes = np.linalg.eigh(np.cov(known.T))
    axes, variance = axes[:, ::-1][:, :7], variance[::-1][:7]
    expected = unit(
        (np.stack([unit(rows.sum(0)) for rows in instances_of(bags)]) - known.mean(0))
        @ axes
        / np.sqrt(variance)
    )
    found = spoc(bags).embedding
    assert spoc.out_dim == 7
    assert_close(found.abs(), np.abs(expected))  # an axis may point either way
    again = make(whiten=7)
    again.load_state_dict(spoc.state_dict())
    assert torch.equal(again(bags).embedding, found)


def test_spoc_leaves_out_directions_without_variance() -> None:
    training = random_bags([2] * 11, WIDTH, dtype=torch.float64)
    training.values[:, 5:] = 0
    spoc = make(whiten=7)
    spoc.fit([training])
    embedding = spoc(training).embedding
    assert embedding.isfinite().all()
    assert not embedding[:, 5:].any()
    assert embedding[:, :5].all()


@pytest.mark.parametrize("bags", [3, 7])
def test_spoc_needs_more_bags_than_components(bags: int) -> None:
    with pytest.raises(InputError, match=f"at most {bags - 1} components, .* training bags.*got 7"):
        make(whiten=7).fit([random_bags([2] * bags, WIDTH, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"whiten": 0}, "option whiten: expected a whole number of at least 1, got 0"),
        ({"whiten": 20}, "at most 19 components, the number of channels, got 20"),
        ({"spatial_prior": 1}, "option spatial_prior: expected true or false, got 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("spoc", in_shape=(WIDTH,), **options)
