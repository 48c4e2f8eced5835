"""Operations over the rows of each bag, against NumPy on one bag at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.ragged.bags import offsets_of
from dragn_cache.ragged.segments import (
    segment_argmax,
    segment_attend,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_outer,
    segment_ranks,
    segment_softmax,
    segment_sum,
)

SIZES = [3, 1, 13, 2, 7, 257, 5]
WIDTH = 11
OFFSETS = offsets_of(torch.tensor(SIZES))
Rows = NDArray[np.float64]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted(values: Tensor, offsets: Tensor) -> Tensor:
    """Each row's weight is its first entry."""
    return segment_sum(values, offsets, values[:, 0].contiguous())


def softmax(values: Tensor, offsets: Tensor) -> Tensor:
    return segment_softmax(values[:, 0], offsets)[:, None]


def softmax_of(rows: Rows) -> Rows:
    powers = np.exp(rows[:, :1])
    return powers / powers.sum()


def softmaxes_of(rows: Rows) -> Rows:
    powers = np.exp(rows)
    result: Rows = powers / powers.sum(0)
    return result


def attended(values: Tensor, offsets: Tensor) -> Tensor:
    """Each row's weights are its first three entries; the three sums side by side."""
    return segment_attend(values, offsets, values[:, :3]).flatten(1)


def outer(values: Tensor, offsets: Tensor) -> Tensor:
    """The first seven columns with all of them, flattened."""
    return segment_outer(values[:, :7], values, offsets).flatten(1)


Operation = Callable[[Tensor, Tensor], Tensor]
OPERATIONS: dict[str, tuple[Operation, Callable[[Rows], Rows]]] = {
    "sum": (segment_sum, lambda rows: rows.sum(0, keepdims=True)),
    "weighted": (weighted, lambda rows: (rows[:, :1] * rows).sum(0, keepdims=True)),
    "mean": (segment_mean, lambda rows: rows.mean(0, keepdims=True)),
    "max": (segment_max, lambda rows: rows.max(0, keepdims=True)),
    "softmax": (softmax, softmax_of),
    "softmax by column": (segment_softmax, softmaxes_of),
    "attended": (attended, lambda rows: (rows[:, :3].T @ rows).reshape(1, -1)),
    "logsumexp": (segment_logsumexp, lambda rows: np.log(np.exp(rows).sum(0, keepdims=True))),
    "outer": (outer, lambda rows: (rows[:, :7].T @ rows).reshape(1, -1)),
}
every_operation = pytest.mark.parametrize("name", list(OPERATIONS))


@every_operation
def test_each_bag_gets_what_numpy_gives_it(name: str) -> None:
    operation, expected = OPERATIONS[name]
    values = draw(sum(SIZES), WIDTH).double()
    rows = values.numpy()
    results = [expected(rows[a:b]) for a, b in pairwise(OFFSETS.tolist())]
    got = operation(values, OFFSETS).numpy()
    np.testing.assert_allclose(got, np.concatenate(results), rtol=1e-12, atol=1e-12)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bag_does_not_depend_on_its_mates_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    operation, _ = OPERATIONS[name]
    values = draw(sum(SIZES), WIDTH).to(dtype)
    together = operation(values, OFFSETS)
    for k, (start, end) in enumerate(pairwise(OFFSETS.tolist())):
        alone = operation(values[start:end], torch.tensor([0, end - start]))
        rows = slice(start, end) if "softmax" in name else slice(k, k + 1)
        assert torch.equal(alone, together[rows])


@every_operation
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    operation, _ = OPERATIONS[name]
    offsets = offsets_of(torch.tensor([3, 1, 5, 2]))
    values = draw(11, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: operation(v, offsets), values)


def test_weights_add_up_to_one_however_large_the_scores() -> None:
    scores = torch.tensor([-1e30, 3.0, 88.0, 9e4, 9e4, -200.0, -200.0, 7.0])
    weights = segment_softmax(scores, torch.tensor([0, 1, 3, 5, 7, 8]))
    assert weights.tolist() == [1, pytest.approx(np.exp(-85)), 1, 0.5, 0.5, 0.5, 0.5, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_and_argmax_are_numpys_with_ties_by_index(dtype: torch.dtype) -> None:
    scores = (3 * draw(sum(SIZES), WIDTH)).round().to(dtype)  # many tie
    ranks, rows = segment_ranks(scores, OFFSETS), segment_argmax(scores, OFFSETS)
    assert ranks.dtype == rows.dtype == torch.int64
    assert torch.equal(segment_ranks(scores[:, 4], OFFSETS), ranks[:, 4])
    for k, (start, end) in enumerate(pairwise(OFFSETS.tolist())):
        bag = scores[start:end].numpy()
        order = np.argsort(-bag, 0, kind="stable")
        np.testing.assert_array_equal(ranks[start:end], np.argsort(order, 0))
        np.testing.assert_array_equal(rows[k], start + bag.argmax(0))


def test_the_largest_of_what_is_no_number_is_still_a_row() -> None:
    scores = torch.tensor([[1.0, float("nan")], [float("nan"), 3.0], [5.0, 2.0]])
    rows = segment_argmax(scores, torch.tensor([0, 2, 3]))
    assert rows.tolist() == [[0, 0], [2, 2]]
