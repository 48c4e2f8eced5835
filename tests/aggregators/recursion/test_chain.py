"""L1Agg's adjoint chain: the layout of its table, and weights worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dragn_cache.aggregators.recursion.chain import ChainLayout, bias_factors, kappa_table

# Of a table for up to 8 instances: where kappa_1, kappa_2, … begin.
FIRST = [2, 8, 14, 22, 30, 40, 50, 62]
# On one pixel with the taps 1, 2, 3 a round multiplies the polynomial of a kappa by
# 1 + 2 x + 3 x^2; kappa_1 is 1, kappa_2 is (1 + x) / 2.
KAPPAS = [
    [1],
    [0.5, 0.5],
    [1, 2, 3],
    [0.5, 1.5, 2.5, 1.5],
    [1, 4, 10, 12, 9],
    [0.5, 2.5, 7, 11, 10.5, 4.5],
    [1, 6, 21, 44, 63, 54, 27],
]


def numbers(layout: ChainLayout) -> Tensor:
    """(1, rows, 1): a table whose rows are their numbers."""
    return torch.arange(layout.rows).view(1, -1, 1)


@pytest.mark.parametrize(
    ("longest", "rounds", "rows"), [(1, 0, 12), (2, 0, 12), (3, 1, 28), (4, 1, 28), (7, 3, 72)]
)
def test_a_table_has_room_for_the_longest_bag(longest: int, rounds: int, rows: int) -> None:
    layout = ChainLayout.for_bags(longest, 2, 3)
    assert (layout.rounds, layout.rows, layout.pixels) == (rounds, rows, 6)


@pytest.mark.parametrize("n", range(1, 8))
def test_rows_of_a_kappa_by_hand(n: int) -> None:
    layout = ChainLayout.for_bags(7, 1, 1)
    assert layout.kappa(n) == slice(FIRST[n - 1], FIRST[n - 1] + n)
    assert layout.first_of_kappa(torch.tensor([7, n])).tolist() == [50, FIRST[n - 1]]


def test_blocks_by_hand() -> None:
    """Two blocks each of 6, 8, 10 and 12 rows."""
    blocks = ChainLayout.for_bags(7, 1, 1).block_of_row().tolist()
    assert blocks == [
        *([0] * 6 + [1] * 6),
        *([2] * 8 + [3] * 8),
        *([4] * 10 + [5] * 10),
        *([6] * 12 + [7] * 12),
    ]


def test_views_of_a_round_by_hand() -> None:
    layout = ChainLayout.for_bags(3, 1, 1)
    table = numbers(layout)
    assert layout.inner_rows(table, 0)[0, :, :, 0].tolist() == [[2, 3], [8, 9]]
    assert layout.inner_rows(table, 1)[0, :, :, 0].tolist() == [
        [14, 15, 16, 17],
        [22, 23, 24, 25],
    ]
    assert layout.windows(table, 0)[0].tolist() == [
        [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]],
        [[6, 7, 8], [7, 8, 9], [8, 9, 10], [9, 10, 11]],
    ]
    assert layout.inner_windows(table, 1)[0].tolist() == [
        [[14, 15, 16], [15, 16, 17]],
        [[22, 23, 24], [23, 24, 25]],
    ]


def test_views_keep_pixels_and_kernels_apart() -> None:
    """Two kernels, three pixels: a window has the pixels of its three rows side by side."""
    layout = ChainLayout.for_bags(1, 1, 3)
    table = torch.arange(2 * 12 * 3).view(2, 12, 3)
    windows = layout.windows(table, 0)
    assert windows.shape == (2, 2, 4, 9)
    assert windows[1, 1, 2].tolist() == list(range(36 + 8 * 3, 36 + 11 * 3))
    layout.inner_rows(table, 0).zero_()
    assert (table == 0).all(2)[1].nonzero().flatten().tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("longest", range(1, 8))
def test_kappas_of_one_pixel_by_hand(longest: int) -> None:
    layout = ChainLayout.for_bags(longest, 1, 1)
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(1, 3, 1, 1)
    table = kappa_table(weight, layout)[0, :, 0]
    between = torch.ones(layout.rows, dtype=torch.bool)
    for n in range(1, longest + 1):
        assert table[layout.kappa(n)].tolist() == KAPPAS[n - 1]
    for n in range(1, 2 * layout.rounds + 3):
        between[layout.kappa(n)] = False
    assert not table[between].any()


def test_kappa_of_three_by_hand() -> None:
    """Two pixels side by side: only the kernel's middle row works."""
    weight = torch.zeros(1, 3, 3, 3, dtype=torch.float64)
    weight[0, :, 1] = torch.arange(1.0, 10.0).view(3, 3)
    layout = ChainLayout.for_bags(3, 1, 2)
    table = kappa_table(weight, layout)[0]
    # Pixel 0 reaches itself by the centre tap and pixel 1 by the left one; half for the mean.
    expected = torch.tensor([[2 + 1, 3 + 2], [5 + 4, 6 + 5], [8 + 7, 9 + 8]]) / 2
    assert torch.equal(table[layout.kappa(3)], expected.double())
    assert table[layout.kappa(1)].tolist() == [[0.5, 0.5]]
    assert table[layout.kappa(2)].tolist() == [[0.25, 0.25]] * 2


def test_bias_factors_by_hand() -> None:
    """The kappas above sum to 1, 1, 6, 6, 36 and 36; every round adds the sum before it."""
    layout = ChainLayout.for_bags(7, 1, 1)
    table = kappa_table(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1), layout)
    assert bias_factors(table, layout)[0].tolist() == [0, 0, 1, 1, 7, 7, 43, 43]


def test_gradients_are_those_of_the_formula() -> None:
    """Both ways of a round: a product with a matrix, and on large maps a convolution."""
    weight = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(3)).double()
    for longest, height, width in ((7, 1, 2), (4, 5, 13)):
        layout = ChainLayout.for_bags(longest, height, width)
        assert torch.autograd.gradcheck(
            lambda w, layout=layout: kappa_table(w, layout)[:, :: layout.rounds + 1],
            (weight.requires_grad_(),),
        )
