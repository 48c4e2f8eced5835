"""RaggedBags: the layout, its errors, and the laws of selecting, mixing and shuffling."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import CONVERTED_VALUES, averaged, offsets_of

SIZES = [3, 0, 1, 7, 2]


def numbered(*in_shape: int, sizes: list[int] = SIZES) -> RaggedBags:
    """Bags whose every value is the number of its row."""
    rows = torch.arange(sum(sizes), dtype=torch.float32)
    values = rows.view(-1, *[1] * len(in_shape)).expand(-1, *in_shape).contiguous()
    return RaggedBags(values, offsets_of(torch.tensor(sizes)))


def test_layout() -> None:
    bags = numbered(5, 2, 3)
    assert len(bags) == 5
    assert bags.in_shape == (5, 2, 3)
    assert bags.sizes.tolist() == SIZES
    assert bags.offsets.tolist() == [0, 3, 3, 4, 11, 13]
    assert bags.segment_ids.tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4]
    assert bags.bag(3)[:, 0, 0, 0].tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert bags.bag(1).shape == (0, 5, 2, 3)


def test_a_bag_is_a_view_of_the_values() -> None:
    bags = numbered(2)
    assert bags.bag(3).data_ptr() == bags.values[4:].data_ptr()


@pytest.mark.parametrize("indices", [[3, 1, 0, 3], torch.tensor([3, 1, 0, 3])])
def test_select_takes_bags_in_the_order_asked_for(indices: list[int] | torch.Tensor) -> None:
    chosen = numbered(2).select(indices)
    row3 = [4, 5, 6, 7, 8, 9, 10]
    assert chosen.values[:, 1].tolist() == [*row3, 0, 1, 2, *row3]
    assert chosen.offsets.tolist() == [0, 7, 7, 10, 17]


def test_select_of_nothing_is_no_bags() -> None:
    none = numbered(2).select([])
    assert len(none) == 0
    assert none.values.shape == (0, 2)


def test_select_carries_gradients() -> None:
    values = torch.ones(5, 2, requires_grad=True)
    bags = RaggedBags(values, torch.tensor([0, 2, 5]))
    torch.autograd.backward(bags.select([1, 1]).values.sum())
    assert values.grad is not None
    assert values.grad[:, 0].tolist() == [0, 0, 2, 2, 2]


def test_from_list_joins() -> None:
    parts = [torch.randn(n, 3, dtype=torch.float16) for n in (2, 0, 5)]
    bags = RaggedBags.from_list(parts)
    assert bags.values.dtype == torch.float16
    for i, part in enumerate(parts):
        assert torch.equal(bags.bag(i), part)


def test_permuted_keeps_every_bag_and_follows_the_generator() -> None:
    bags = numbered(1, sizes=[3, 0, 1, 97, 2])
    shuffled = bags.permuted(torch.Generator().manual_seed(5))
    again = bags.permuted(torch.Generator().manual_seed(5))
    other = bags.permuted(torch.Generator().manual_seed(6))
    assert torch.equal(shuffled.values, again.values)
    assert not torch.equal(shuffled.values, other.values)
    assert torch.equal(shuffled.offsets, bags.offsets)
    for i in range(len(bags)):
        assert torch.equal(shuffled.bag(i).sort(dim=0).values, bags.bag(i))
    assert not torch.equal(shuffled.bag(3), bags.bag(3))


def test_permuted_gives_all_orders_equally_often() -> None:
    draws = 6000
    bags = numbered(1, sizes=[3] * draws)
    rows = bags.permuted(torch.Generator().manual_seed(0)).values.view(draws, 3)
    orders = (rows - rows.min(1, keepdim=True).values) @ torch.tensor([9.0, 3.0, 1.0])
    counts = torch.bincount(orders.long())
    counts = counts[counts > 0]
    assert len(counts) == 6
    # Binomial(6000, 1/6): standard deviation 28.9; five of them.
    assert (counts - draws / 6).abs().max() < 145


def test_mixed_bags_take_each_instance_from_a_bag_of_its_column() -> None:
    values = torch.arange(17.0)[:, None]  # bags 0..2 | 3..7 | 8..10 | 11..15 | 16
    bags = RaggedBags(values, torch.tensor([0, 3, 8, 11, 16, 17]))
    generator = torch.Generator().manual_seed(3)
    seen = Counter()
    for _ in range(500):
        mixed = bags.mixed(torch.tensor([[1, 0, 1], [3, 2, 1]]), generator)
        assert mixed.offsets.tolist() == [0, 5, 8, 13]
        drawn = mixed.values.flatten().tolist()
        choices = [*zip(range(3, 8), range(11, 16), strict=True)]
        choices += [*zip(range(3), range(8, 11), strict=True)]
        assert all(value in pair for value, pair in zip(drawn, choices, strict=False))
        assert drawn[8:] == [3, 4, 5, 6, 7]
        seen.update(enumerate(drawn[:8]))
    assert len(seen) == 16
    assert all(180 < count < 320 for count in seen.values())


def test_bags_of_other_sizes_cannot_be_mixed() -> None:
    bags = RaggedBags(torch.zeros(5, 2), torch.tensor([0, 3, 5]))
    message = r"mixed, bags \[0, 1\]: expected equally many instances, got \[3, 2\]; mix views of"
    with pytest.raises(InputError, match=message):
        bags.mixed(torch.tensor([[0], [1]]), torch.Generator())


def test_the_first_bags_are_the_same_memory() -> None:
    bags = RaggedBags(torch.rand(5, 2), torch.tensor([0, 3, 3, 5]))
    first = bags.first(2)
    assert first.offsets.tolist() == [0, 3, 3]
    assert first.values.data_ptr() == bags.values.data_ptr()
    assert len(first.values) == 3


def test_to_changes_the_values_only() -> None:
    bags = numbered(2).to(dtype=torch.float64, device="cpu")
    assert bags.values.dtype == torch.float64
    assert bags.offsets.dtype == torch.int64


def test_offsets_stay_on_the_host_and_the_rest_is_with_the_values() -> None:
    bags = numbered(2).to(device="meta")
    assert bags.offsets.device.type == "cpu"
    assert bags.sizes.device.type == bags.segment_ids.device.type == "meta"
    assert bags.select([3, 0]).values.shape == (10, 2)


def test_index_tables_made_in_inference_mode_can_be_used_in_training() -> None:
    bags = numbered(2)
    with torch.inference_mode():
        _ = bags.segment_ids, bags.sizes
    weight = torch.ones(5, requires_grad=True)
    torch.autograd.backward(weight.index_select(0, bags.segment_ids).sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == SIZES


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (torch.zeros(4), r"got \(4,\)"),
        (torch.zeros(4, 2, 2), r"got \(4, 2, 2\)"),
        (torch.zeros(4, 0), r"got \(4, 0\)"),
        (torch.zeros(4, 2, dtype=torch.int64), "got .* torch.int64"),
    ],
)
def test_values_that_cannot_be_bags(values: torch.Tensor, match: str) -> None:
    with pytest.raises(InputError, match=match):
        RaggedBags(values, torch.tensor([0, 4]))


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        ([1, 4], "got a start at 1"),
        ([0, 3], "ends at N = 4, got an end at 3"),
        ([0, 3, 2, 4], "got 3 before 2 at bag 1"),
        ([], r"got \(0,\) torch.float32"),
        ([0.0, 4.0], "got .* torch.float32"),
        ([[0, 4]], r"got \(1, 2\)"),
    ],
)
def test_offsets_that_do_not_fit(offsets: list[int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        RaggedBags(torch.zeros(4, 2), torch.tensor(offsets))


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_maps_are_averaged_in_pieces_row_by_row(stored: torch.dtype) -> None:
    values = torch.randn(37, 300, 7, 7, generator=torch.Generator().manual_seed(0)).to(stored)
    assert values.numel() > CONVERTED_VALUES
    for dtype in (torch.float32, torch.float64):
        means = averaged(values, dtype)
        assert means.dtype == dtype
        exact = values.numpy().astype(np.float64).mean((2, 3))
        np.testing.assert_allclose(means.numpy(), exact, rtol=1e-6, atol=1e-7)
        assert torch.equal(means[36], averaged(values[36:], dtype)[0])
    assert averaged(values[:0], torch.float64).shape == (0, 300)


@pytest.mark.parametrize("index", [-1, 5])
def test_bags_that_are_not_there(index: int) -> None:
    with pytest.raises(InputError, match=rf"from 0 to 4, got {index}"):
        numbered(2).bag(index)
    with pytest.raises(InputError, match=rf"from 0 to 4, got {index}"):
        numbered(2).select([0, index])


def test_select_refuses_a_mask() -> None:
    with pytest.raises(InputError, match=r"torch\.bool; turn a mask"):
        numbered(2).select(torch.tensor([True, False, True, True, False]))


def test_from_list_refuses_nothing_and_mixtures() -> None:
    with pytest.raises(InputError, match="expected at least one bag"):
        RaggedBags.from_list([])
    with pytest.raises(InputError, match=r"bag 1: expected instances \(2,\) .*, got \(3,\)"):
        RaggedBags.from_list([torch.zeros(1, 2), torch.zeros(1, 3)])
    with pytest.raises(InputError, match=r"bag 1: .* got \(2,\) torch.float64"):
        RaggedBags.from_list([torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.float64)])
