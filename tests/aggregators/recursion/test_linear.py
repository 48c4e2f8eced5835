"""L1Agg as one weighted sum against the plain triple loop: values, gradients, independence."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from numpy_layers import shaken
from plain_recursion import draw
from torch import Tensor
from tracked_memory import TrackedMemory

from dragn_cache.aggregators import create_aggregator
from dragn_cache.aggregators.dragn import Dragn
from dragn_cache.aggregators.recursion import kernels, linear, long_chain, weighted_sum
from dragn_cache.aggregators.recursion.linear import pool_linearly
from dragn_cache.aggregators.recursion.weighted_sum import weighted_pool
from dragn_cache.devices import one_thread
from dragn_cache.ragged import RaggedBags


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, kernels of their own take the way that test_compiled.py tests."""
    monkeypatch.setattr(kernels, "kernels", lambda *size: None)


ALL_SIZES = [4, 33, 1, 9, 2, 3, 32, *range(5, 9), *range(10, 32)]  # each of 1..33


def dragn(in_shape: tuple[int, ...], **options: Any) -> Dragn:
    """L1Agg, its weights a little off the recursive mean, so that long bags stay bounded."""
    aggregator = create_aggregator("dragn", in_shape=in_shape, unit="L1Agg", **options)
    return cast(Dragn, shaken(aggregator, by=0.05, seed=5))


def triple_loop(bags: RaggedBags, weight: Tensor, bias: Tensor) -> Tensor:
    """Algorithm 1 as the paper writes it, with one convolution for each window. (B, C)"""
    embeddings = []
    for b in range(len(bags)):
        bag = bags.bag(b).to(weight.dtype)
        o = list(bag if bag.dim() == 4 else bag[:, :, None, None])
        while len(o) > 2:
            folded = []
            for j in range(len(o) - 2):
                window = torch.stack([o[j], o[j + 1], o[j + 2]], dim=1)  # (C, 3, h, w)
                if len(weight) == 1:
                    u = F.conv2d(window, weight, bias, padding=weight.shape[-1] // 2)[:, 0]
                else:
                    inputs = window.flatten(0, 1)[None]  # (1, 3 C, h, w)
                    padding = weight.shape[-1] // 2
                    u = F.conv2d(inputs, weight, bias, padding=padding, groups=len(weight))[0]
                folded.append(u)
            o = folded
        embeddings.append((o[0] if len(o) == 1 else (o[0] + o[1]) / 2).mean((1, 2)))
    return torch.stack(embeddings)


def error(got: Tensor | None, wanted: Tensor | None) -> float:
    """Largest difference, relative to the largest absolute value."""
    assert got is not None
    assert wanted is not None
    assert got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())


def assert_like_the_loop(
    aggregator: Dragn, bags: RaggedBags, *, values: float, gradients: float
) -> None:
    conv = aggregator.unit[0]
    weight, bias = (p.detach().clone().requires_grad_() for p in (conv.weight, conv.bias))
    ours, theirs = (bags.values.clone().requires_grad_() for _ in range(2))
    embedding = aggregator(RaggedBags(ours, bags.offsets)).embedding
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(embedding.shape, generator=generator).to(embedding)
    (embedding * factor).sum().backward()
    with one_thread():  # thousands of tiny convolutions
        expected = triple_loop(RaggedBags(theirs, bags.offsets), weight, bias)
        (expected * factor).sum().backward()
    assert error(embedding, expected) <= values
    assert error(conv.weight.grad, weight.grad) <= gradients
    assert error(conv.bias.grad, bias.grad) <= gradients
    if bags.values.dtype == torch.float16:
        gradients = 1e-3  # the gradients are fp16 themselves
    assert error(ours.grad, theirs.grad) <= gradients


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("computed", [torch.float32, torch.float64], ids=["in_fp32", "in_fp64"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 10), (7, 7)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 17])
def test_l1agg_is_the_triple_loop(
    channels: int, size: tuple[int, int], computed: torch.dtype, stored: torch.dtype
) -> None:
    shape = (channels, *size)
    values, gradients = (1e-5, 1e-4) if computed == torch.float32 else (1e-10, 1e-10)
    assert_like_the_loop(
        dragn(shape).to(computed),
        draw(shape, ALL_SIZES, stored),
        values=values,
        gradients=gradients,
    )


@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("mixing", ["shared", "per_channel"])
@pytest.mark.parametrize("shape", [(5, 2, 3), (3, 9, 8), (7,)], ids=str)
def test_other_kernels_channels_of_their_own_and_maps_too_large_for_matrices(
    shape: tuple[int, ...], mixing: str, kernel: int
) -> None:
    aggregator = dragn(shape, mixing=mixing, kernel=kernel).double()
    bags = draw(shape, [5, 1, 8, 2, 3, 11, 8, 4], torch.float64)
    assert_like_the_loop(aggregator, bags, values=1e-10, gradients=1e-10)


@pytest.mark.parametrize("mixing", ["shared", "per_channel"])
def test_features_of_half_precision_are_worked_on_in_blocks(
    mixing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of three rows: some hold several bags, some a piece of one."""
    monkeypatch.setattr(weighted_sum, "BLOCK_VALUES", 3 * 5 * 6)
    aggregator = dragn((5, 2, 3), mixing=mixing)
    bags = draw((5, 2, 3), [1, 1, 7, 2, 3, 6, 1, 4], torch.float16)
    assert_like_the_loop(aggregator, bags, values=1e-5, gradients=1e-4)


@pytest.mark.parametrize("mixing", ["shared", "per_channel"])
def test_gradients_are_those_of_the_formula(mixing: str) -> None:
    aggregator = dragn((2, 3, 2), mixing=mixing).double()
    bags = draw((2, 3, 2), [5, 4, 1, 7], torch.float64)
    conv = aggregator.unit[0]

    def embed(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear.pool_linearly(RaggedBags(values, bags.offsets), weight, bias)

    inputs = (bags.values.requires_grad_(), conv.weight, conv.bias)
    assert torch.autograd.gradcheck(embed, inputs)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("mixing", ["shared", "per_channel"])
def test_a_bag_does_not_depend_on_its_mates_bit_for_bit(
    mixing: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weighted_sum, "BLOCK_VALUES", 4 * 17 * 40)
    aggregator = dragn((17, 4, 10), mixing=mixing)
    bags = draw((17, 4, 10), [3, 13, 1, 9, 2, 5, 33], stored)
    together = aggregator(bags).embedding
    for i in range(len(bags)):
        alone, among = aggregator(bags.select([i])), aggregator(bags.select([2, i, 3, 4]))
        assert torch.equal(alone.embedding[0], together[i])
        assert torch.equal(among.embedding[1], together[i])


@pytest.mark.parametrize("mixing", ["shared", "per_channel"])
def test_instances_that_begin_at_odd_places_change_rounding_only(mixing: str) -> None:
    """An instance of 13 × 7 × 11 numbers is no multiple of 16 bytes.

    Where it begins, and so the last digit of some products (MKL's on AMD), depends on the mates.
    """
    aggregator, bags = dragn((13, 7, 11), mixing=mixing), draw((13, 7, 11), [3, 13, 1, 9, 2, 5, 33])
    together = aggregator(bags).embedding
    for i in range(len(bags)):
        alone, among = aggregator(bags.select([i])), aggregator(bags.select([2, i, 3, 4]))
        for embedding in (alone.embedding[0], among.embedding[1]):
            torch.testing.assert_close(embedding, together[i], rtol=1e-6, atol=1e-6)


def test_bags_that_never_meet_the_unit_give_it_no_gradient() -> None:
    aggregator = dragn((5, 2, 3))
    bags = draw((5, 2, 3), [1, 2, 2])
    bags.values.requires_grad_()
    aggregator(bags).embedding.sum().backward()
    assert [p.grad for p in aggregator.parameters()] == [None, None]


def test_recursions_that_are_not_linear_or_mix_all_channels_keep_the_general_path() -> None:
    bags = draw((5, 2, 3), [6, 3])
    for options in ({"mixing": "full"}, {"share_rounds": False, "rounds": 2}):
        aggregator = dragn((5, 2, 3), **options)
        calls: list[int] = []
        aggregator.unit.register_forward_pre_hook(lambda _, args, n=calls: n.append(len(args[0])))
        aggregator(bags)
        assert calls


@pytest.mark.parametrize("stored", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_many_weights_share_one_reading(
    stored: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under vmap: the results and gradients of one call for each model."""
    monkeypatch.setattr(weighted_sum, "BLOCK_VALUES", 5 * 7 * 11)
    bags = draw((7, 2, 3), [5, 1, 8, 2, 3, 4], stored)
    weight = torch.randn(11, 1, 3, 3, 3, generator=torch.Generator().manual_seed(3)) / 4
    bias = torch.linspace(-1, 1, 11)[:, None]
    stacked = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    single = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    got = torch.func.vmap(lambda w, b: linear.pool_linearly(bags, w, b))(*stacked)
    each = zip(*single, strict=True)
    wanted = torch.stack([linear.pool_linearly(bags, w, b) for w, b in each])
    assert error(got, wanted) <= 1e-6
    factor = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward([(got * factor).sum(), (wanted * factor).sum()])
    for ours, theirs in zip(stacked, single, strict=True):
        assert error(ours.grad, theirs.grad) <= 1e-5


def test_values_of_their_own_for_each_model() -> None:
    values = torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(4))
    kappa = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(6))
    offsets = torch.tensor([0, 2, 6])
    got = torch.func.vmap(lambda v, k: weighted_pool(v, k, offsets))(values, kappa)
    product = torch.einsum("mncp,mnp->mnc", values, kappa)
    torch.testing.assert_close(got, torch.stack([product[:, :2].sum(1), product[:, 2:].sum(1)], 1))


@pytest.mark.parametrize("shape", [(19, 2, 3), (7,), (3, 9, 9)], ids=str)
@pytest.mark.parametrize("sizes", [[37, 1, 12, 2, 12, 5], [3], [40]], ids=str)
def test_the_chain_of_long_bags_gives_the_same(
    shape: tuple[int, ...], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, and the gradients of features, weights and bias, to rounding in double precision."""
    generator = torch.Generator().manual_seed(5)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    values = torch.randn(int(offsets[-1]), *shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 3, 3, 3, generator=generator, dtype=torch.float64) / 6
    bias = torch.randn(1, generator=generator, dtype=torch.float64)
    results = []
    for limit in (long_chain.TABLE_VALUES, 0):
        monkeypatch.setattr(long_chain, "TABLE_VALUES", limit)
        inputs = [x.clone().requires_grad_() for x in (values, weight, bias)]
        pooled = pool_linearly(RaggedBags(inputs[0], offsets), inputs[1], inputs[2])
        factors = torch.arange(1.0, 1 + pooled.numel(), dtype=torch.float64).view_as(pooled)
        (pooled * factors).sum().backward()
        results.append([pooled.detach(), *(x.grad for x in inputs)])
    for table, chain in zip(*results, strict=True):
        assert table is not None
        torch.testing.assert_close(table, chain, rtol=1e-11, atol=1e-11)


def test_the_chain_of_long_bags_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table for 901 instances has 406,800 rows, of which nine are made in training."""
    monkeypatch.setattr(long_chain, "TABLE_VALUES", 0)
    weight = torch.full((1, 3, 1, 1), 1 / 3, requires_grad=True)
    bags = RaggedBags(torch.rand(901, 5), torch.tensor([0, 901]))
    with TrackedMemory() as memory:
        pool_linearly(bags, weight, torch.zeros(1)).sum().backward()
    assert memory.peak < 4 * long_chain.needed_values(901, 1, training=True) < 4 * 406_800
