"""NetVLAD against its formulas in NumPy, and its start from k-means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    Array,
    Weights,
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
from dragn_cache.ragged import RaggedBags

WIDTH = 19
SIZES = [5, 1, 13, 2, 3]


def make(in_shape: tuple[int, ...] = (WIDTH,), **options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    return shaken(create_aggregator("netvlad", in_shape=in_shape, **options)).double().eval()


def vlad(w: Weights, x: Array) -> Array:
    """The embedding of descriptors (n, D): residuals by cluster, to length 1 twice."""
    x = unit(x)
    a = softmax(linear(w, "assign", x))
    residuals = (a[:, :, None] * (x[:, None] - w["centres"])).sum(0)
    return unit(unit(residuals).ravel())


def test_netvlad_sums_residuals_by_cluster() -> None:
    netvlad, bags = make(clusters=7), random_bags(SIZES, WIDTH, dtype=torch.float64)
    w = weights_of(netvlad)
    assert netvlad.out_dim == 7 * WIDTH
    assert_close(netvlad(bags).embedding, [vlad(w, rows) for rows in instances_of(bags)])


def test_netvlad_of_maps_takes_averages_or_pixels_and_can_be_reduced() -> None:
    bags = random_bags(SIZES, WIDTH, 2, 3, dtype=torch.float64)
    by_average, by_pixel = (
        make((WIDTH, 2, 3), clusters=7, reduce=11, pixels=p) for p in (False, True)
    )
    w = weights_of(by_pixel)
    for k, maps in enumerate(instances_of(bags)):
        pixels = maps.transpose(0, 2, 3, 1).reshape(-1, WIDTH)
        assert_close(by_pixel(bags).embedding[k], unit(w["reduce.weight"] @ vlad(w, pixels)))
        averages = maps.mean((2, 3))
        assert_close(by_average(bags).embedding[k], unit(w["reduce.weight"] @ vlad(w, averages)))


def clustered(bags: int) -> tuple[RaggedBags, Array]:
    """Instances around three directions at right angles, and those."""
    around = np.eye(3, WIDTH)
    noise = 0.05 * random_bags([7] * bags, WIDTH, dtype=torch.float64).values
    rows = torch.from_numpy(around)[torch.arange(7 * bags) % 3] + noise
    return RaggedBags(5 * rows, 7 * torch.arange(bags + 1)), around


def test_netvlad_starts_from_kmeans() -> None:
    training, around = clustered(11)
    netvlad = make(clusters=3)
    state = torch.get_rng_state()
    netvlad.fit(training.between(k, k + 1) for k in range(11))
    assert torch.equal(torch.get_rng_state(), state)
    w = weights_of(netvlad)
    c = w["centres"]
    x = unit(training.values.numpy())
    nearest = (x @ around[:, :WIDTH].T).argmax(1)
    means = np.stack([x[nearest == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(c[(means @ c.T).argmax(1)], means, atol=1e-6)
    # w and b are 2 alpha c and -alpha |c|², for one alpha.
    alpha = w["assign.weight"][0, 0] / c[0, 0] / 2
    np.testing.assert_allclose(w["assign.weight"], 2 * alpha * c, rtol=1e-5)
    np.testing.assert_allclose(w["assign.bias"], -alpha * (c**2).sum(1), rtol=1e-5)
    # The two largest assignments are a hundredfold apart, on geometric average.
    a = np.sort(softmax(linear(w, "assign", x)), 1)
    assert np.exp(np.log(a[:, -1] / a[:, -2]).mean()) == pytest.approx(100, rel=1e-4)
    other = make(clusters=3)
    other.fit([training])
    assert torch.equal(other(training).embedding, netvlad(training).embedding)


def test_netvlad_samples_when_there_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dragn_cache.aggregators.netvlad.SAMPLE", 31)
    training, around = clustered(11)
    netvlad, other = make(clusters=3), make(clusters=3)
    netvlad.fit([training])
    other.fit(training.between(k, k + 1) for k in range(11))
    assert torch.equal(other(training).embedding, netvlad(training).embedding)
    found = weights_of(netvlad)["centres"] @ around.T
    np.testing.assert_allclose(np.sort(found.max(1)), 1, atol=0.1)
    assert sorted(found.argmax(1)) == [0, 1, 2]


def test_netvlad_needs_as_many_different_instances_as_clusters() -> None:
    few = random_bags([2, 3], WIDTH, dtype=torch.float64)
    with pytest.raises(InputError, match=r"netvlad, option clusters: .* got 7 for 5 features"):
        make(clusters=7).fit([few])
    with pytest.raises(InputError, match=r"netvlad, option clusters: .* got 7 for 10 features"):
        make(clusters=7).fit([few, few])


def test_netvlad_does_not_stretch_the_rounding_of_instances_on_their_centre() -> None:
    netvlad = create_aggregator("netvlad", in_shape=(WIDTH,), clusters=7)
    on_centres = torch.nn.functional.normalize(random_bags([7], WIDTH).values)
    with torch.no_grad():
        netvlad.get_parameter("centres").copy_(on_centres)
        netvlad.get_parameter("assign.weight").copy_(1e4 * on_centres)
        netvlad.get_parameter("assign.bias").zero_()
    for k, row in enumerate(on_centres):
        on_it, beside = row.expand(11, -1), row + 0.01 * on_centres[k - 1]
        embedding = netvlad(RaggedBags.from_list([on_it, beside[None]])).embedding
        lengths = embedding.detach().norm(dim=1)
        assert lengths[0] < 0.5
        assert lengths[1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 1}, "option clusters: expected a whole number of at least 2, got 1"),
        ({"pixels": "yes"}, "option pixels: .* got 'yes'"),
        ({"reduce": 2.0}, r"option reduce: .* got 2\.0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("netvlad", in_shape=(WIDTH,), **options)
