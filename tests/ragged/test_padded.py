"""Padded batches of ragged bags, and attention on them, against each bag by itself in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy_layers import attention
from torch import Tensor

from dragn_cache.ragged.bags import offsets_of
from dragn_cache.ragged.padded import (
    Linear,
    Padding,
    attend,
    firsts,
    padded_width,
    with_first,
)

SIZES = [5, 1, 37, 16, 2, 17, 5]
OFFSETS = offsets_of(torch.tensor(SIZES))
N, B, HEADS = sum(SIZES), len(SIZES), 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_widths_hold_the_bag_waste_little_and_are_few() -> None:
    sizes = np.arange(1, 5000)
    widths = padded_width(sizes)
    assert (widths >= sizes).all()
    assert (widths % 16 == 0).all()
    assert (widths <= np.maximum(sizes + 15, 1.25 * sizes)).all()
    assert len(np.unique(widths)) < 32
    assert padded_width(np.array([1, 16, 17, 128, 129, 256, 257])).tolist() == [
        *(16, 16, 32, 128, 160, 256, 320)
    ]


def test_one_long_bag_does_not_make_the_others_long() -> None:
    padding = Padding(offsets_of(torch.tensor([10_000, *[3] * 50])))
    assert sorted(group.rows.shape for group in padding.groups) == [(1, 10_240), (50, 16)]


@pytest.mark.parametrize("exact", [False, True])
def test_rows_come_back_where_they_were(exact: bool) -> None:
    values = draw(N, 4, 2)
    padding = Padding(OFFSETS, exact=exact)
    assert padding.bags == B
    assert torch.equal(padding.ragged([g.padded(values) for g in padding.groups]), values)
    assert torch.equal(padding.map(lambda x, group: 2 * x, values), 2 * values)
    per_bag = draw(B, 4)
    assert torch.equal(padding.dense([per_bag[g.bags] for g in padding.groups]), per_bag)
    if exact:
        assert all(group.mask is None for group in padding.groups)
        assert {tuple(g.rows.shape) for g in padding.groups} >= {(2, 5), (1, 37)}


def test_places_without_a_row_are_masked_repeat_the_bags_first_row_and_can_be_zeroed() -> None:
    values = draw(N, 4)
    seen = 0
    for group in Padding(OFFSETS).groups:
        batch = group.padded(values)
        for row, bag in enumerate(group.bags.tolist()):
            size, own = SIZES[bag], values[OFFSETS[bag] : OFFSETS[bag + 1]]
            assert torch.equal(batch[row, :size], own)
            assert torch.equal(batch[row, size:], own[:1].expand(batch.shape[1] - size, -1))
            zeroed = group.zeroed(batch)[row]
            assert torch.equal(zeroed[:size], own)
            assert not zeroed[size:].any()
            mask = torch.ones(size) if group.mask is None else group.mask[row]
            assert mask.tolist() == [True] * size + [False] * (len(mask) - size)
            seen += size
    assert seen == N


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("queries", ["rows", "per bag"])
@pytest.mark.parametrize("keys", ["rows", "per bag"])
def test_attention_is_each_bags_own(queries: str, keys: str, scale: float | None) -> None:
    width, value_width = 12, 15
    q = draw(N, width) if queries == "rows" else draw(B, 2, width)
    shape = (N,) if keys == "rows" else (B, 7)
    k, v = 3 * draw(*shape, width, seed=1), draw(*shape, value_width, seed=2)
    result = attend(q, k, v, Padding(OFFSETS), heads=HEADS, scale=scale)
    assert result.shape == (*q.shape[:-1], value_width)

    def of(x: Tensor, bag: int) -> Tensor:
        return x[bag] if x.dim() == 3 else x[OFFSETS[bag] : OFFSETS[bag + 1]]

    for bag in range(B):
        own = [of(x, bag).double().numpy() for x in (q, k, v)]
        expected = attention(*own, HEADS, (width / HEADS) ** -0.5 if scale is None else scale)
        np.testing.assert_allclose(of(result, bag), expected, rtol=1e-4, atol=1e-5)


def test_padding_passes_no_gradient_and_takes_none() -> None:
    q, k, v = (draw(N, 6, seed=i).requires_grad_() for i in range(3))
    attend(q, k, v, Padding(OFFSETS), heads=HEADS).sum().backward()
    assert v.grad is not None
    # Weights add up to 1 over each query's keys: what v's rows receive adds up to the queries.
    for bag, size in enumerate(SIZES):
        received = v.grad[OFFSETS[bag] : OFFSETS[bag + 1]].sum(0)
        torch.testing.assert_close(received, torch.full((6,), float(size)))
    # A bag of one row attends to itself whatever its query and key are.
    for x in (q, k):
        assert x.grad is not None
        assert not x.grad[OFFSETS[1]].any()


@pytest.mark.parametrize("rows", [1, 2, 3, 15, 16, 29])
def test_a_row_of_a_linear_layer_does_not_depend_on_how_many_there_are(rows: int) -> None:
    torch.manual_seed(0)
    layer, x = Linear(19, 23), draw(29, 19)
    expected = x.double().numpy() @ layer.weight.detach().double().numpy().T
    result = layer(x[:rows])
    np.testing.assert_allclose(
        result.detach(), expected[:rows] + layer.bias.detach().numpy(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(result, layer(x)[:rows], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer(x[:rows].view(rows, 1, 19))[:, 0], result, rtol=0, atol=0)


def test_a_row_in_front_of_each_bag() -> None:
    values, row = draw(N, 4), draw(4, seed=1)
    joined, offsets = with_first(row, values, OFFSETS)
    assert offsets.diff().tolist() == [size + 1 for size in SIZES]
    for bag in range(B):
        own = joined[offsets[bag] : offsets[bag + 1]]
        assert torch.equal(own[0], row)
        assert torch.equal(own[1:], values[OFFSETS[bag] : OFFSETS[bag + 1]])
    assert torch.equal(firsts(joined, offsets), row.expand(B, -1))
