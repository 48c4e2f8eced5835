"""DRAGN's orders of instances: seeded permutations, and the leaves of a tree."""

from __future__ import annotations

from itertools import permutations as all_orders
from typing import Any

import numpy as np
import plain_recursion
import pytest
import torch
from run_stores import LABELS, make_bags, make_features, with_splits
from torch import Tensor

from dragn_cache.aggregators import create_aggregator
from dragn_cache.aggregators.dragn import Dragn
from dragn_cache.aggregators.recursion import kernels
from dragn_cache.aggregators.recursion.orders import (
    clustered_orders,
    permutations,
    permuted_orders,
    reordered,
)
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.train import train

SHAPE = (5, 2, 3)
SIZES = [7, 1, 4, 2, 11, 3]
# L1Agg as a weighted sum, the recursion in C++, that in PyTorch.
UNITS: dict[str, dict[str, Any]] = {
    "l1": {"unit": "L1Agg"},
    "l1_per_channel": {"unit": "L1Agg", "mixing": "per_channel"},
    "l3": {"unit": "L3Agg"},
    "l2_full": {"unit": "L2Agg", "mixing": "full"},
}
every_unit = pytest.mark.parametrize("unit", list(UNITS))


def dragn(unit: str, in_shape: tuple[int, ...] = SHAPE, **options: Any) -> Dragn:
    torch.manual_seed(3)
    made = create_aggregator("dragn", in_shape=in_shape, init="default", **UNITS[unit], **options)
    assert isinstance(made, Dragn)
    return made.double().eval()


def draw(in_shape: tuple[int, ...] = SHAPE, sizes: list[int] = SIZES) -> RaggedBags:
    return plain_recursion.draw(in_shape, sizes, torch.float64)


def gradients(aggregator: Dragn, embedding: Tensor, values: Tensor) -> list[Tensor]:
    weight = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2)).double()
    inputs = (values, *aggregator.parameters())
    return list(torch.autograd.grad((embedding * weight).sum(), inputs))


# --- orders ------------------------------------------------------------------------------------


def test_permutations_stay_in_their_bags_and_depend_on_the_size_alone() -> None:
    orders = permuted_orders(torch.tensor([0, 5, 6, 13, 18]), 3)
    assert orders.shape == (3, 18)
    for k in range(3):
        assert orders[k].sort().values.tolist() == list(range(18))
    assert torch.equal(orders[:, :5], orders[:, 13:] - 13)
    assert torch.equal(orders[:, :5], permuted_orders(torch.tensor([0, 5]), 7)[:3])
    assert orders[:, 5].tolist() == [5, 5, 5]


def test_permutations_are_these_for_ever() -> None:
    """Embeddings of models that were trained before depend on them."""
    assert permutations(5, 2).tolist() == [[3, 2, 4, 1, 0], [0, 1, 3, 2, 4]]


def test_all_permutations_are_equally_likely() -> None:
    drawn = [tuple(order) for order in permutations(3, 6000).tolist()]
    for order in all_orders(range(3)):
        assert abs(drawn.count(order) - 1000) < 120


def test_clustered_orders_stay_in_their_bags() -> None:
    """A bag of one, and four on a line whose leaves the tree's own test has."""
    rows = torch.tensor([[7.0], [10.0], [0.0], [5.0], [1.0]])
    orders = clustered_orders(RaggedBags(rows, torch.tensor([0, 1, 5])))
    assert orders.tolist() == [[0, 3, 4, 2, 1]]


def test_reordered_bags_are_copies_one_after_the_other() -> None:
    bags = RaggedBags(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 2, 3]))
    copies = reordered(bags, torch.tensor([[1, 0, 2], [0, 1, 2]]))
    assert copies.values.flatten().tolist() == [2, 1, 3, 1, 2, 3]
    assert copies.offsets.tolist() == [0, 2, 3, 5, 6]


# --- DRAGN on them -----------------------------------------------------------------------------


@every_unit
def test_permuted_is_the_mean_over_the_permutations(unit: str) -> None:
    aggregator, plain, bags = dragn(unit, order="permuted", permutations=3), dragn(unit), draw()
    assert aggregator.order_sensitive
    values = bags.values.requires_grad_()
    ours = aggregator(bags).embedding
    rows = [
        torch.cat([start + torch.from_numpy(permutations(n, 3)[k]) for start, n in places(bags)])
        for k in range(3)
    ]
    each = [plain(RaggedBags(values[order], bags.offsets)).embedding for order in rows]
    theirs = torch.stack(each).mean(0)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for mine, own in zip(
        gradients(aggregator, ours, values), gradients(plain, theirs, values), strict=True
    ):
        torch.testing.assert_close(mine, own, rtol=1e-9, atol=1e-12)


@every_unit
def test_clustered_is_the_recursion_on_the_trees_leaves(unit: str) -> None:
    aggregator, plain, bags = dragn(unit, order="clustered"), dragn(unit), draw()
    assert not aggregator.order_sensitive
    values = bags.values.requires_grad_()
    ours = aggregator(bags).embedding
    rows = clustered_orders(bags)[0]
    theirs = plain(RaggedBags(values[rows], bags.offsets)).embedding
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for mine, own in zip(
        gradients(aggregator, ours, values), gradients(plain, theirs, values), strict=True
    ):
        torch.testing.assert_close(mine, own, rtol=1e-9, atol=1e-12)
    shuffled = bags.permuted(torch.Generator().manual_seed(5))
    torch.testing.assert_close(aggregator(shuffled).embedding, ours, rtol=1e-9, atol=1e-12)


@every_unit
@pytest.mark.parametrize("order", ["permuted", "clustered"])
def test_a_bag_does_not_depend_on_its_mates(unit: str, order: str) -> None:
    bags = draw((17, 2, 3)).to(dtype=torch.float32)
    aggregator = dragn(unit, (17, 2, 3), order=order).float()
    together = aggregator(bags).embedding
    assert torch.equal(aggregator(bags).embedding, together)
    for i in range(len(bags)):
        for chosen in ([i], [i, 4, 1]):
            alone = aggregator(bags.select(chosen)).embedding[0]
            assert (alone - together[i]).abs().max() <= 1e-6 * together[i].abs().max()


def test_the_recursion_in_pytorch_takes_orders_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregator, bags = dragn("l3", order="permuted"), draw()
    expected = aggregator(bags).embedding
    monkeypatch.setattr(kernels, "kernels", lambda *size: None)  # as without a compiler
    torch.testing.assert_close(aggregator(bags).embedding, expected, rtol=1e-9, atol=1e-12)


def test_many_permuted_models_share_one_reading() -> None:
    models, bags = [dragn("l1", order="permuted", permutations=3) for _ in range(2)], draw()
    with torch.no_grad():
        models[1].unit.convolutions[0].weight.mul_(-0.5)
    state, _ = torch.func.stack_module_state(list(models))
    assert models[0].stackable
    together = torch.func.vmap(
        lambda parameters: torch.func.functional_call(models[0], parameters, (bags,)).embedding
    )(state)
    for k, model in enumerate(models):
        torch.testing.assert_close(together[k], model(bags).embedding, rtol=1e-9, atol=1e-12)
    assert not dragn("l1", order="clustered").stackable


def test_training_does_not_shuffle_what_is_clustered() -> None:
    bags = with_splits(make_bags(17))
    features = make_features(bags)
    targets = np.array([[label in (bag.labels or ()) for label in LABELS] for bag in bags], np.int8)
    ragged = RaggedBags.from_list([torch.from_numpy(features[bag.bag_id]) for bag in bags])
    data = LabelledBags(ragged, targets, tuple(bag.split for bag in bags), "multilabel")
    config = TrainConfig(options={"unit": "L1Agg", "order": "clustered"}, epochs=2, lr=1e-2)
    shuffled = train(data, config.replace(order="random"))
    assert shuffled.history == train(data, config.replace(order="manifest")).history
    other = config.replace(options={"unit": "L1Agg"})
    assert (
        train(data, other.replace(order="random")).history
        != train(data, other.replace(order="manifest")).history
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": "random"}, "option order: expected given, permuted or clustered"),
        ({"permutations": 3}, "option permutations: expected no value with order=given, got 3"),
        ({"order": "permuted", "permutations": 0}, "option permutations: expected a whole number"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        create_aggregator("dragn", in_shape=SHAPE, **options)


def places(bags: RaggedBags) -> list[tuple[int, int]]:
    """First row and size of each bag."""
    return list(zip(bags.offsets[:-1].tolist(), bags.offsets.diff().tolist(), strict=True))
