"""DTFD-MIL against its formulas in NumPy, and the splitting into pseudo-bags."""

from __future__ import annotations

from itertools import pairwise
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
from dragn_cache.aggregators.dtfd import pseudo_bags
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.ragged.bags import offsets_of

WIDTH, EMBED, ATTENTION, LABELS = 19, 11, 7, 2
SIZES = [5, 1, 13, 2, 23]
TARGETS = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [0, 1]])
every_form = pytest.mark.parametrize("distill", ["afs", "max", "maxmin"])


def make(**options: Any) -> Aggregator:
    torch.manual_seed(3)
    defaults = {"labels": LABELS, "embed": EMBED, "attn_dim": ATTENTION}
    return create_aggregator("dtfd", in_shape=(WIDTH,), **defaults | options).eval()


def supervise() -> Supervision:
    return Supervision(TARGETS, torch.nn.functional.binary_cross_entropy_with_logits)


@every_form
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_it_is_what_the_paper_says(distill: str, groups: int) -> None:
    dtfd, bags = make(distill=distill, groups=groups), random_bags(SIZES, WIDTH)
    w = weights_of(dtfd)
    result = dtfd(bags, supervise())
    logits: list[Array] = []
    targets: list[Array] = []
    for k, x in enumerate(instances_of(bags)):
        h = relu_network(w, "embed", x)
        distilled: list[Array] = []
        for part in np.array_split(h, min(groups, len(h))):
            a = softmax(gated(w, "tier1", part), 0)
            pooled = (a * part).sum(0)
            logits.append(linear(w, "classifier", pooled))
            targets.append(TARGETS[k].numpy())
            activation = (a * part @ w["classifier.weight"].T).max(1)
            highest, lowest = part[activation.argmax()], part[activation.argmin()]
            distilled += {"afs": [pooled], "max": [highest], "maxmin": [highest, lowest]}[distill]
        features = np.array(distilled)
        b = softmax(gated(w, "tier2", features), 0)
        assert_close(result.embedding[k], (b * features).sum(0))
        attention = result.attention[rows_of(bags, k)].detach().double().numpy()
        assert attention.sum() == pytest.approx(1)
        np.testing.assert_allclose(attention @ h, (b * features).sum(0), rtol=1e-4, atol=1e-6)
        most = {"afs": len(h), "max": min(groups, len(h)), "maxmin": 2 * groups}[distill]
        assert (attention > 0).sum() <= most
    expected = binary_loss(np.array(logits), np.array(targets))
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    assert dtfd.bag_weight == 1


@every_form
def test_in_training_the_split_is_random_and_the_attention_still_fits(distill: str) -> None:
    dtfd, bags = make(distill=distill), random_bags(SIZES, WIDTH)
    clean = dtfd(bags).embedding
    dtfd.train()
    torch.manual_seed(5)
    first = dtfd(bags)
    torch.manual_seed(5)
    assert torch.equal(dtfd(bags).embedding, first.embedding)
    assert not torch.equal(dtfd(bags).embedding, first.embedding)
    h = dtfd.embed(bags.values)  # type: ignore[operator]
    for k, size in enumerate(SIZES):
        rows = rows_of(bags, k)
        torch.testing.assert_close(first.attention[rows] @ h[rows], first.embedding[k])
        # Four instances or fewer are pseudo-bags of one, whatever the split.
        assert torch.allclose(first.embedding[k], clean[k], rtol=1e-6) == (size <= 4)


def test_with_one_pseudo_bag_the_order_does_not_matter() -> None:
    bags = random_bags(SIZES, WIDTH)
    shuffled = bags.permuted(torch.Generator().manual_seed(2))
    one, four = make(groups=1), make(groups=4)
    assert not one.order_sensitive
    assert four.order_sensitive
    torch.testing.assert_close(one(bags).embedding, one(shuffled).embedding)
    assert not torch.allclose(four(bags).embedding, four(shuffled).embedding, rtol=1e-3)


@every_form
def test_every_parameter_learns(distill: str) -> None:
    dtfd, bags = make(distill=distill), random_bags(SIZES, WIDTH)
    result = dtfd(bags, supervise())
    check_gradients(dtfd, result.embedding.square().sum() + result.loss)


@pytest.mark.parametrize("groups", [1, 2, 4, 7])
def test_parts_are_those_of_numpys_array_split(groups: int) -> None:
    sizes = [1, 2, 3, 4, 5, 8, 13, 29]
    offsets = offsets_of(torch.tensor(sizes))
    parts, by_bag = pseudo_bags(offsets, groups)
    assert parts.dtype == by_bag.dtype == torch.int64
    expected = [[len(p) for p in np.array_split(np.arange(n), min(groups, n))] for n in sizes]
    edges = by_bag.tolist()
    assert [parts.diff()[a:b].tolist() for a, b in pairwise(edges)] == expected
    assert parts[by_bag].tolist() == offsets.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": True}, "option labels: expected a whole number of at least 1, got True"),
        ({"groups": 0}, "option groups: expected a whole number of at least 1, got 0"),
        ({"embed": "x"}, "option embed: expected one width or several, .*, got 'x'"),
        ({"attn_dim": 0}, "option attn_dim: expected a whole number of at least 1, got 0"),
        ({"distill": "MaxS"}, "option distill: expected afs, max or maxmin, got 'MaxS'"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**options)
