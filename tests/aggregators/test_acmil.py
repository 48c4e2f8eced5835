"""ACMIL against its formulas in NumPy, and the masking of its highest scores."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    Array,
    assert_close,
    binary_loss,
    check_gradients,
    gated,
    instances_of,
    linear,
    random_bags,
    relu_network,
    rows_of,
    softmax,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.aggregators.acmil import masked_rows, similarity
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.ragged.bags import offsets_of

WIDTH, EMBED, ATTENTION, LABELS = 19, 11, 7, 2
SIZES = [5, 1, 13, 2, 23]
TARGETS = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [0, 1]])


def make(**options: Any) -> Aggregator:
    torch.manual_seed(3)
    defaults = {"labels": LABELS, "embed": EMBED, "attn_dim": ATTENTION}
    return create_aggregator("acmil", in_shape=(WIDTH,), **defaults | options).eval()


def supervise() -> Supervision:
    return Supervision(TARGETS, torch.nn.functional.binary_cross_entropy_with_logits)


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("branches", [1, 2, 5])
def test_it_is_what_the_paper_says(branches: int) -> None:
    acmil, bags = make(branches=branches), random_bags(SIZES, WIDTH)
    w = weights_of(acmil)
    result = acmil(bags, supervise())
    logits, targets, similarities = [], [], []
    for k, x in enumerate(instances_of(bags)):
        h = relu_network(w, "embed", x)
        a = softmax(gated(w, "scores", h), 0)  # (n, K)
        assert_close(result.attention[rows_of(bags, k)], a.mean(1))
        assert_close(result.embedding[k], a.mean(1) @ h)
        logits += [linear(w, f"classifiers.{i}", a[:, i] @ h) for i in range(branches)]
        targets += [TARGETS[k].numpy()] * branches
        similarities += [cosine(a[:, i], a[:, j]) for i, j in combinations(range(branches), 2)]
    expected = binary_loss(np.array(logits), np.array(targets))
    expected += float(np.mean(similarities)) if similarities else 0
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert acmil.bag_weight == 1


@pytest.mark.parametrize(("top", "rate"), [(10, 0.6), (3, 0.5), (1, 0.9), (7, 0.999)])
def test_that_part_of_the_highest_is_masked(top: int, rate: float) -> None:
    sizes, branches = [1, 2, 3, 7, 11, 40], 5
    offsets = offsets_of(torch.tensor(sizes))
    scores = torch.randn(sum(sizes), branches, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(0)
    first, second = (masked_rows(scores, offsets, top, rate) for _ in range(2))
    for chosen in (first, second):
        for a, b in pairwise(offsets.tolist()):
            n = min(top, b - a)
            assert (chosen[a:b].sum(0) == int(n * rate)).all()
            lowest = scores[a:b].topk(n, 0).values[-1]
            assert (scores[a:b] >= lowest)[chosen[a:b]].all()
    assert not first[offsets[1:-1]].all()
    if (top, rate) == (10, 0.6):
        assert not torch.equal(first, second)
        assert not (first == first[:, :1]).all()  # each branch draws for itself


def test_each_of_the_highest_is_masked_equally_often() -> None:
    offsets = torch.tensor([0, 5, 12])
    scores = torch.arange(12.0)[:, None].expand(-1, 2000)
    torch.manual_seed(0)
    often = masked_rows(scores, offsets, 4, 0.5).double().mean(1)
    assert often[[0, 5, 6, 7]].tolist() == [0, 0, 0, 0]
    highest = often[[1, 2, 3, 4, 8, 9, 10, 11]]
    assert ((highest - 0.5).abs() < 0.05).all()  # four and a half standard errors


def test_masking_is_for_training_only() -> None:
    acmil, bags = make(), random_bags(SIZES, WIDTH)
    clean = acmil(bags)
    assert (clean.attention > 0).all()
    acmil.train()
    torch.manual_seed(5)
    first = acmil(bags, supervise())
    torch.manual_seed(5)
    assert torch.equal(acmil(bags, supervise()).embedding, first.embedding)
    assert not torch.equal(acmil(bags).embedding, first.embedding)
    assert first.embedding.isfinite().all()
    check_gradients(acmil, first.embedding.square().sum() + first.loss)
    single = make(branches=1).train()(bags).attention
    masked = [int((single[rows_of(bags, k)] == 0).sum()) for k in range(len(SIZES))]
    assert masked == [3, 0, 6, 1, 6]


def test_similarity_by_hand() -> None:
    offsets = torch.tensor([0, 2, 3])
    attention = torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8], [1.0, 1.0, 1.0]])
    # First bag: 0 between the first two, 0.6 and 0.8 with the third; second bag: 1 three times.
    assert similarity(attention, offsets).item() == pytest.approx((0 + 0.6 + 0.8 + 3) / 6)
    assert similarity(attention[:, :1], offsets).item() == 0


@pytest.mark.parametrize("branches", [1, 2, 5])
def test_every_parameter_learns(branches: int) -> None:
    acmil, bags = make(branches=branches), random_bags(SIZES, WIDTH)
    result = acmil(bags, supervise())
    check_gradients(acmil, result.embedding.square().sum() + result.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 1.0}, r"option labels: expected a whole number of at least 1, got 1\.0"),
        ({"branches": 0}, "option branches: expected a whole number of at least 1, got 0"),
        ({"top": -1}, "option top: expected a whole number of at least 1, got -1"),
        ({"attn_dim": 0}, "option attn_dim: expected a whole number of at least 1, got 0"),
        ({"embed": 0}, "option embed: expected one width or several, .*, got 0"),
        ({"mask": 1.0}, r"option mask: expected a number from 0 to below 1, got 1\.0"),
        ({"mask": "0.6"}, r"option mask: expected a number from 0 to below 1, got '0\.6'"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)
