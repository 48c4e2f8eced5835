"""RRT-MIL against the paper's formulas in NumPy, one bag and region at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    Array,
    Weights,
    attention,
    gated,
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

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.aggregators.rrt import partition
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of

WIDTH, EMBED, HEADS, KERNEL, MEANS = 19, 12, 3, 5, 2
SIZES = [5, 1, 23, 2, 83, 17, 3]


def make(**options: Any) -> Aggregator:
    torch.manual_seed(2)
    options = {"embed": EMBED, "heads": HEADS, "kernel": KERNEL, "means": MEANS} | options
    return shaken(create_aggregator("rrt", in_shape=(WIDTH,), attn_dim=7, **options))


def regions_of(count: int, most: int) -> list[list[int]]:
    """The instances of each region, by way of the square itself."""
    side = math.ceil(math.sqrt(count))
    per_side = min(most, 1 if side <= 2 else max(2, math.ceil(side / 4)))
    width = math.ceil(side / per_side)
    square = np.full((per_side * width) ** 2, -1)
    square[:count] = range(count)
    square = square.reshape(per_side * width, -1)
    found = []
    for i, j in np.ndindex(per_side, per_side):
        cells = square[i * width : (i + 1) * width, j * width : (j + 1) * width].ravel()
        found.append([int(cell) for cell in cells if cell >= 0])
    return [region for region in found if region]


def inside(w: Weights, x: Array) -> Array:
    """R of one region."""
    q, k, v = (heads_of(part, HEADS) for part in np.split(linear(w, "inside.qkv", x), 3, 1))
    mixed = []
    for head in range(HEADS):
        scores = q[head] @ k[head].T / np.sqrt(EMBED / HEADS)
        around = np.pad(scores, ((KERNEL // 2, KERNEL // 2), (0, 0)))
        taps = w["inside.epeg.weight"][head, 0, :, 0]
        added = np.stack([taps @ around[i : i + KERNEL] for i in range(len(x))])
        mixed.append(softmax(scores + added) @ v[head])
    return linear(w, "inside.o", np.concatenate(mixed, 1))


def across(w: Weights, x: Array, regions: list[list[int]]) -> Array:
    """C of one bag."""
    scores = linear(w, "across.phi", x)
    result = np.zeros_like(x)
    for mean in range(MEANS):
        rows = np.stack([softmax(scores[r, mean]) @ x[r] for r in regions])
        q, k, v = np.split(linear(w, "across.qkv", rows), 3, 1)
        rows = linear(w, "across.o", attention(q, k, v, HEADS, (EMBED / HEADS) ** -0.5))
        for region, row in zip(regions, rows, strict=True):
            own = scores[region, mean]
            scaled = (own - own.min()) / max(own.max() - own.min(), 1e-3)
            result[region] += (scaled * softmax(scores[region])[:, mean])[:, None] * row
    return result


@pytest.mark.parametrize("most", [8, 2, 1])
def test_it_is_what_the_paper_says(most: int) -> None:
    model, bags = make(regions=most), random_bags(SIZES, WIDTH)
    w, result = weights_of(model), model(bags)
    assert model.out_dim == EMBED
    for bag, x in enumerate(instances_of(bags)):
        regions = regions_of(len(x), most)
        x = np.maximum(linear(w, "embed", x), 0)
        normed = norm(w, "norm1", x)
        for region in regions:
            x[region] += inside(w, normed[region])
        x = norm(w, "norm3", x + across(w, norm(w, "norm2", x), regions))
        weights = softmax(gated(w, "pool", x)[:, 0])
        np.testing.assert_allclose(
            result.attention[rows_of(bags, bag)].detach(), weights, rtol=1e-3, atol=1e-6
        )
        np.testing.assert_allclose(
            result.embedding[bag].detach(), weights @ x, rtol=1e-3, atol=1e-4
        )


def test_regions_are_squares_of_the_square() -> None:
    sizes = [11, 2, 64, 65]
    regions = partition(offsets_of(torch.tensor(sizes)), 8)
    assert regions.counts.tolist() == [4, 1, 4, 9]
    assert regions.rows[:11].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10]
    assert regions.offsets[:6].tolist() == [0, 4, 8, 10, 11, 13]
    first, per_bag = 0, regions.counts.tolist()
    for size, count, start in zip(sizes, per_bag, [0, 11, 13, 77], strict=True):
        edges = regions.offsets[first : first + count + 1].tolist()
        found = [(regions.rows[a:b] - start).tolist() for a, b in itertools.pairwise(edges)]
        assert found == regions_of(size, 8)
        first += count


def test_small_bags_have_few_regions() -> None:
    sizes = [1, 4, 5, 64, 65, 1024, 10_000]
    counts = partition(offsets_of(torch.tensor(sizes)), 8).counts
    assert counts.tolist() == [1, 1, 2, 4, 9, 64, 64]


def test_equal_instances_are_not_told_apart_by_rounding() -> None:
    model = make()
    row = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(4))
    bags = RaggedBags.from_list([row.expand(n, -1) for n in SIZES])
    together = model(bags)
    for bag, size in enumerate(SIZES):
        alone = model(bags.select([bag]))
        torch.testing.assert_close(alone.embedding[0], together.embedding[bag], rtol=0, atol=1e-3)
        assert alone.attention.shape == (size,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed": 0}, "option embed: expected a whole number of at least 1, got 0"),
        ({"regions": 2.0}, r"option regions: expected a whole number of at least 1, got 2\.0"),
        ({"means": True}, "option means: expected a whole number of at least 1, got True"),
        ({"kernel": 4}, "option kernel: expected an odd number, got 4; give kernel=5"),
        (
            {"embed": 13, "heads": 3},
            "option embed: expected a multiple of heads, 3, got 13; give embed=12",
        ),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)
