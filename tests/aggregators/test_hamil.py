"""HAMIL against a naive clustering and a recursion of plain convolutions, one merge at a time."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import plain_recursion
import pytest
import torch
from numpy.typing import NDArray
from plain_recursion import needs_compiler
from torch import Tensor, nn

from dragn_cache.aggregators import create_aggregator
from dragn_cache.aggregators.hamil import Hamil
from dragn_cache.aggregators.recursion import compiled, kernels
from dragn_cache.aggregators.recursion.tree import (
    leaf_order,
    merge_levels,
    node_depths,
    plan_levels,
    single_link_tree,
)
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags

SIZES = [4, 13, 1, 9, 2, 3, 5, 1, 7]
SHAPE = (5, 2, 3)


@pytest.fixture(params=[pytest.param("C++", marks=needs_compiler), "PyTorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of merging, one after the other; in C++ the unit itself is not called."""
    way: str = request.param
    if way == "PyTorch":
        monkeypatch.setattr(kernels, "kernels", lambda *size: None)
        return way

    def refused(*_: object) -> Tensor:
        raise AssertionError("merged by PyTorch")

    monkeypatch.setattr(Hamil, "_merge", refused)
    return way


def hamil(in_shape: tuple[int, ...] = SHAPE, *, seed: int = 0, **options: Any) -> Hamil:
    torch.manual_seed(seed)
    made = create_aggregator("hamil", in_shape=in_shape, **options)
    assert isinstance(made, Hamil)
    return made


def random_hamil(in_shape: tuple[int, ...] = SHAPE, **options: Any) -> Hamil:
    """With PyTorch's random start, and BN weights and statistics that are not all 0 or 1."""
    made = hamil(in_shape, init="default", **options)
    plain_recursion.draw_statistics(made.unit.norms)
    return made


def draw(
    in_shape: tuple[int, ...] = SHAPE,
    sizes: list[int] = SIZES,
    dtype: torch.dtype = torch.float64,
) -> RaggedBags:
    return plain_recursion.draw(in_shape, sizes, dtype)


def naive_tree(vectors: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Merge the two clusters with the nearest pair of members until one is left."""
    clusters = {k: [k] for k in range(len(vectors))}
    merges = []
    while len(clusters) > 1:
        gaps = {
            (a, b): min(
                float(np.linalg.norm(vectors[i] - vectors[j]))
                for i in clusters[a]
                for j in clusters[b]
            )
            for a, b in combinations(sorted(clusters), 2)
        }
        a, b = min(gaps, key=lambda pair: gaps[pair])
        clusters[len(vectors) + len(merges)] = clusters.pop(a) + clusters.pop(b)
        merges.append((a, b))
    return merges


def by_recursion(bags: RaggedBags, unit: nn.Module, *, symmetric: bool = True) -> Tensor:
    """(B, C): node by node, merge by merge."""

    def merge(x: Tensor, y: Tensor, level: int) -> Tensor:
        layers = plain_recursion.at_round(unit, level)
        result: Tensor = layers(torch.stack((x, y), dim=1))[:, 0]
        return result

    embeddings = []
    for k in range(len(bags)):
        bag = bags.bag(k)
        maps = list(bag if bag.dim() == 4 else bag[:, :, None, None])
        vectors = torch.stack(maps).mean((2, 3)).detach().double().numpy()
        levels = [0] * len(maps)  # how many merges lie below a node on its longest branch
        for a, b in naive_tree(vectors):
            x, y, level = maps[a], maps[b], max(levels[a], levels[b])
            merged = merge(x, y, level)
            maps.append((merged + merge(y, x, level)) / 2 if symmetric else merged)
            levels.append(level + 1)
        embeddings.append(maps[-1].mean((1, 2)))
    return torch.stack(embeddings)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("unit", ["L1Agg", "L2Agg", "L3Agg"])
def test_it_is_the_recursion(unit: str, kernel: int, symmetric: bool) -> None:
    aggregator = (
        random_hamil(unit=unit, kernel=kernel, symmetric=symmetric, bn="auto").double().eval()
    )
    plain, bags = plain_recursion.plain_copy(aggregator.unit), draw()
    assert aggregator.order_sensitive is not symmetric
    features = [bags.values.clone().requires_grad_() for _ in range(2)]
    ours = aggregator(RaggedBags(features[0], bags.offsets)).embedding
    theirs = by_recursion(RaggedBags(features[1], bags.offsets), plain, symmetric=symmetric)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).double()
    torch.autograd.backward([(ours * weight).sum(), (theirs * weight).sum()])
    grads = [f.grad for f in features]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)
    for mine, own in zip(aggregator.unit.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("in_shape", [(19,), (5, 9, 8), (35, 2, 3)], ids=str)
def test_vectors_large_maps_and_many_channels(in_shape: tuple[int, ...], bn: bool) -> None:
    aggregator = random_hamil(in_shape, bn=bn).double().eval()
    bags = draw(in_shape, [3, 1, 5])
    theirs = by_recursion(bags, plain_recursion.plain_copy(aggregator.unit))
    torch.testing.assert_close(aggregator(bags).embedding, theirs, rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_ways_train_alike(symmetric: bool, bn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More channels than a vector has lanes; hidden maps kept and computed again."""
    bags, seen = draw((35, 2, 3)), []
    for way in ("kept", "again", "PyTorch"):
        if way == "again":
            monkeypatch.setattr(compiled, "HIDDEN_BYTES", 0)
        if way == "PyTorch":
            monkeypatch.setattr(kernels, "kernels", lambda *size: None)
        aggregator = random_hamil((35, 2, 3), bn=bn, symmetric=symmetric).double().train()
        features = bags.values.clone().requires_grad_()
        embedding = aggregator(RaggedBags(features, bags.offsets)).embedding
        embedding.square().sum().backward()
        assert features.grad is not None
        gradients = [p.grad for p in aggregator.parameters() if p.grad is not None]
        assert len(gradients) == len(list(aggregator.parameters()))
        seen.append([embedding, features.grad, *gradients, *aggregator.buffers()])
    for kept, again, theirs in zip(*seen, strict=True):
        assert torch.equal(kept, again)
        torch.testing.assert_close(kept, theirs, rtol=1e-8, atol=1e-10)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_bag_gives_the_same_bits_alone(dtype: torch.dtype) -> None:
    aggregator = random_hamil((35, 2, 3)).eval()
    bags = draw((35, 2, 3), dtype=dtype)
    together = aggregator(bags).embedding
    for k, n in enumerate(SIZES):
        alone = aggregator(RaggedBags(bags.bag(k), torch.tensor([0, n]))).embedding
        assert torch.equal(alone[0], together[k]), k


@pytest.mark.parametrize(
    ("unit", "bn", "parameters"),
    [
        ("L1Agg", None, 19),
        ("L2Agg", False, 57),
        ("L2Agg", None, 57 + 4),
        ("L3Agg", False, 95),
        ("L3Agg", None, 95 + 8),
    ],
)
def test_parameter_counts(unit: str, bn: bool | None, parameters: int) -> None:
    aggregator = hamil((17, 2, 3), unit=unit, bn=bn)
    assert sum(p.numel() for p in aggregator.parameters()) == parameters


def test_one_is_itself_and_two_meet_the_unit_once(way: str) -> None:
    aggregator = random_hamil(unit="L2Agg").eval()
    bags = draw(sizes=[1, 2], dtype=torch.float32)
    batches: list[int] = []
    aggregator.unit.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    first, second = aggregator(bags).embedding
    assert batches == ([2 * SHAPE[0]] if way == "PyTorch" else [])
    assert torch.equal(first, bags.values[0].mean((1, 2)))
    x, y = bags.values[1], bags.values[2]
    merged = (aggregator.unit(torch.stack((x, y), 1)) + aggregator.unit(torch.stack((y, x), 1))) / 2
    torch.testing.assert_close(second, merged[:, 0].mean((1, 2)))


# --- the tree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 23])
def test_trees_are_those_of_a_naive_clustering(n: int) -> None:
    vectors = np.random.default_rng(n).normal(size=(n, 11))
    assert [tuple(m) for m in single_link_tree(vectors).tolist()] == naive_tree(vectors)


def test_equal_distances_merge_by_index() -> None:
    line = np.arange(4.0)[:, None]
    assert single_link_tree(line).tolist() == [[0, 1], [2, 4], [3, 5]]
    twins = np.zeros((4, 3))
    assert single_link_tree(twins).tolist() == [[0, 1], [2, 4], [3, 5]]


def test_a_square_of_distances_is_taken_for_features() -> None:
    """Two points and their distances look alike to SciPy; here rows are always instances."""
    square = np.array([[0.0, 1, 4], [1, 0, 9], [4, 9, 0]])
    assert single_link_tree(square).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("both_orders", [False, True])
def test_levels_are_planned_by_hand(both_orders: bool) -> None:
    """A chain of 4 (rows 0-3), a bag of 1 (row 4) and two pairs that meet (rows 5-8).

    Behind them lie the results of the levels, bag after bag.
    """
    chain = np.array([[0, 1], [2, 4], [3, 5]])
    pairs = np.array([[0, 1], [2, 3], [4, 5]])
    schedule = plan_levels([chain, np.empty((0, 2), np.int64), pairs], both_orders=both_orders)
    assert (schedule.orders, schedule.one_array) == (2 if both_orders else 1, True)
    *rounds, last = schedule.rounds
    expected = [[[0, 1], [5, 6], [7, 8]], [[2, 9], [10, 11]], [[3, 12]]]
    for step, pairs_of_level in zip(rounds, expected, strict=True):
        mirrored = [two for a, b in pairs_of_level for two in ([a, b], [b, a])]
        assert step.members.tolist() == (mirrored if both_orders else pairs_of_level)
        assert len(step.finished) == len(step.last_rows) == 0
    assert [step.first_result for step in rounds] == [9, 12, 14]
    assert (last.finished.tolist(), last.last_rows.tolist()) == (
        [0, 1, 2],
        [[14, 14], [4, 4], [13, 13]],
    )
    assert len(last.members) == 0


def test_every_instance_is_merged_once_and_each_level_is_one_call() -> None:
    bags = draw((3,), SIZES)
    trees = [single_link_tree(bags.bag(k).numpy()) for k in range(len(bags))]
    calls: list[int] = []

    def add(level: int, x: Tensor, y: Tensor) -> Tensor:
        assert level == len(calls)
        calls.append(len(x))
        return x + y

    levels = plan_levels(trees, both_orders=False).rounds
    sums = merge_levels(levels, bags.values, add)
    torch.testing.assert_close(sums, torch.stack([bags.bag(k).sum(0) for k in range(len(bags))]))
    assert sum(calls) == sum(SIZES) - len(SIZES)
    assert len(calls) == len(levels) - 1  # the last round merges nothing


def test_depths_by_hand() -> None:
    assert node_depths(np.array([[0, 1], [2, 4], [3, 5]])).tolist() == [3, 3, 2, 1, 2, 1, 0]
    assert node_depths(np.empty((0, 2), np.int64)).tolist() == [0]


def test_leaves_by_hand() -> None:
    """On a line: 0 and 1 merge, then 5 joins, then 10; their mean is 4."""
    line = np.array([[10.0], [0.0], [5.0], [1.0]])
    merges = single_link_tree(line)
    # From the mean: 6, 4, 1, 3. {0, 1} is 3.5 from it, more than 5; {5, 0, 1} is 8/3, less than 10.
    assert line[leaf_order(line, merges), 0].tolist() == [5, 1, 0, 10]


def test_leaves_do_not_depend_on_the_order_given() -> None:
    rng = np.random.default_rng(3)
    for n in (1, 3, 4, 8, 17):
        vectors = rng.normal(size=(n, 7))
        order = leaf_order(vectors, single_link_tree(vectors))
        assert sorted(order.tolist()) == list(range(n))
        shuffled = vectors[rng.permutation(n)]
        again = leaf_order(shuffled, single_link_tree(shuffled))
        np.testing.assert_array_equal(shuffled[again], vectors[order])


# --- the start and the statistics --------------------------------------------------------------


def tree_mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    nodes = list(rows)
    for a, b in naive_tree(rows):
        nodes.append((nodes[a] + nodes[b]) / 2)
    result: NDArray[np.float64] = nodes[-1]
    return result


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("unit", ["L1Agg", "L2Agg", "L3Agg"])
def test_mean_init_is_the_mean_at_every_merge(unit: str, symmetric: bool) -> None:
    aggregator = hamil(unit=unit, bn=False, symmetric=symmetric).double()
    bags = draw()
    bags = RaggedBags(bags.values.abs(), bags.offsets)
    embedding = aggregator(bags).embedding.detach().numpy()
    for k in range(len(bags)):
        expected = tree_mean(bags.bag(k).mean((2, 3)).numpy())
        np.testing.assert_allclose(embedding[k], expected, rtol=1e-10)


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("unit", ["L2Agg", "L3Agg"])
def test_mean_init_is_not_its_own_mirror_image(unit: str, bn: bool) -> None:
    """Inputs and hidden maps both swapped: what this leaves alone, gradients leave so."""
    bags = draw()

    def gradients(aggregator: Hamil) -> list[Tensor]:
        aggregator(bags).embedding.square().sum().backward()
        return [
            conv.weight.grad
            for conv in aggregator.unit.convolutions
            if conv.weight.grad is not None
        ]

    first, *_, last = gradients(hamil(unit=unit, bn=bn).double().train())
    assert not torch.allclose(first, first.flip(0, 1), rtol=1e-2)
    assert not torch.allclose(last, last.flip(1), rtol=1e-2)
    mirrored = hamil(unit=unit, bn=bn).double().train()
    nn.init.dirac_(mirrored.unit.convolutions[0].weight)
    first, *_, last = gradients(mirrored)
    torch.testing.assert_close(first, first.flip(0, 1))
    torch.testing.assert_close(last, last.flip(1))


@pytest.mark.usefixtures("way")
def test_batch_norm_takes_and_keeps_each_levels_statistics() -> None:
    """Bags of 3 and 2: two merges on the first level, one on the second, both orders in each."""
    aggregator = random_hamil(unit="L2Agg", bn="on").double().train()
    bags = draw(sizes=[3, 2])
    conv1, norm, relu, conv2 = plain_recursion.plain_copy(aggregator.unit)
    assert isinstance(norm, plain_recursion.RoundNorm)
    seen: list[Tensor] = []

    def merge(*two: tuple[Tensor, Tensor]) -> list[Tensor]:
        both = [torch.stack(order, 1) for x, y in two for order in ((x, y), (y, x))]
        hidden = conv1(torch.cat(both))
        seen.append(hidden.transpose(0, 1).flatten(1))  # (2, values)
        mean, var = seen[-1].mean(1), seen[-1].var(1, correction=0)
        scale = norm.weight / (var + 1e-5).sqrt()
        y = (hidden - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        return list(conv2(relu(y)).view(len(two), 2, *SHAPE).mean(1))

    first, second = bags.bag(0), bags.bag(1)
    ((a, b), _) = naive_tree(first.mean((2, 3)).numpy())
    (c,) = {0, 1, 2} - {a, b}
    merged, root = merge((first[a], first[b]), (second[0], second[1]))
    (last,) = merge((first[c], merged))
    expected = torch.stack((last, root)).mean((2, 3))
    torch.testing.assert_close(aggregator(bags).embedding, expected)
    (own,) = aggregator.unit.norms
    plain_recursion.assert_moved(own, norm, seen)


@pytest.mark.usefixtures("way")
def test_bags_of_one_leave_the_statistics_alone() -> None:
    aggregator = hamil(bn="on").train()
    before = {key: value.clone() for key, value in aggregator.state_dict().items()}
    aggregator(draw(sizes=[1, 1], dtype=torch.float32))
    for key, value in aggregator.state_dict().items():
        assert torch.equal(value, before[key]), key


# --- what is refused ---------------------------------------------------------------------------


def test_features_that_are_not_finite_have_no_distances() -> None:
    bags = draw(sizes=[3, 5])
    bags.values[4, 2] = torch.nan
    with pytest.raises(
        InputError, match="clustering, bag 1 of the batch, instance 1: expected fin"
    ):
        hamil()(bags)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"unit": "L4Agg"}, "option unit: expected L1Agg, L2Agg or L3Agg, got 'L4Agg'"),
        ({"kernel": 2}, "hamil, option kernel: expected 1, 3, 5 or 7, got 2"),
        (
            {"bn": True, "unit": "L1Agg"},
            "option bn: expected off or auto with unit=L1Agg",
        ),
        ({"symmetric": 1}, "option symmetric: expected true or false, got 1"),
        ({"init": "zeros"}, "option init: .* got 'zeros'"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        create_aggregator("hamil", in_shape=SHAPE, **options)
