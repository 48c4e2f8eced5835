"""DRAGN against a plain loop of Algorithm 1, and its batch normalisation against nn.BatchNorm2d."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from plain_recursion import (
    SIZES,
    RoundNorm,
    assert_like_the_loop,
    assert_moved,
    close,
    dragn,
    draw,
    norms_of,
    plain_copy,
    random_dragn,
)
from torch import Tensor

from dragn_cache.aggregators import create_aggregator
from dragn_cache.aggregators.recursion import kernels
from dragn_cache.aggregators.recursion.rounds import plan_rounds
from dragn_cache.aggregators.recursion.units import UnitConv
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("in_shape", [(17, 2, 3), (5, 7, 1), (19,)], ids=str)
@pytest.mark.parametrize(
    ("unit", "bn"), [("L1Agg", None), ("L2Agg", False), ("L3Agg", False), ("L3Agg", True)]
)
def test_the_recursion_is_algorithm_1(
    unit: str, bn: bool | None, in_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    aggregator = random_dragn(in_shape, unit=unit, bn=bn).to(dtype)
    aggregator.train(mode=bn is not True)
    values, gradients = (1e-5, 1e-4) if dtype == torch.float32 else (1e-10, 1e-10)
    assert_like_the_loop(
        aggregator, draw(in_shape, dtype=dtype), values=values, gradients=gradients
    )


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("mixing", ["shared", "per_channel", "full"])
@pytest.mark.parametrize("unit", ["L1Agg", "L3Agg"])
def test_every_mixing_and_kernel_is_algorithm_1(unit: str, mixing: str, kernel: int) -> None:
    aggregator = random_dragn((5, 2, 3), unit=unit, mixing=mixing, kernel=kernel, bn=False).double()
    bags = draw((5, 2, 3), dtype=torch.float64)
    assert_like_the_loop(aggregator, bags, mixing=mixing, values=1e-10, gradients=1e-10)


@pytest.mark.parametrize("scope_and_bn", [("round", False), ("window", True)])
def test_one_unit_per_round(scope_and_bn: tuple[str, bool]) -> None:
    scope, bn = scope_and_bn
    aggregator = random_dragn(
        (5, 2, 3), share_rounds=False, rounds=3, bn=bn, bn_scope=scope
    ).double()
    assert len(aggregator.units) == 3
    assert aggregator.unit is aggregator.units[0]
    bags = draw((5, 2, 3), dtype=torch.float64)
    assert_like_the_loop(aggregator, bags, values=1e-10, gradients=1e-9)


@pytest.mark.parametrize("mixing", ["shared", "per_channel", "full"])
@pytest.mark.parametrize("unit", ["L2Agg", "L3Agg"])
def test_window_scope_is_the_loop_with_batch_norm(unit: str, mixing: str) -> None:
    aggregator = random_dragn((5, 2, 3), unit=unit, mixing=mixing, bn="on", bn_scope="window")
    bags = draw((5, 2, 3), dtype=torch.float64)
    aggregator.double().train()
    assert_like_the_loop(aggregator, bags, mixing=mixing, values=1e-10, gradients=1e-9)
    calls = sum((n - 1) ** 2 // 4 for n in SIZES)
    assert [norm.num_batches_tracked for norm in norms_of(aggregator)] == [calls] * (
        int(unit[1]) - 1
    )


@pytest.mark.parametrize("mixing", ["shared", "per_channel", "full"])
def test_round_scope_normalises_by_the_round_and_keeps_its_moments(mixing: str) -> None:
    """Two bags; the second leaves after one round. The hidden layer's inputs are written out."""
    C, h, w = 5, 2, 3
    aggregator = random_dragn((C, h, w), unit="L2Agg", mixing=mixing, bn="on").double().train()
    bags = draw((C, h, w), [5, 4], dtype=torch.float64)
    conv1, norm, relu, conv2 = plain_copy(aggregator.unit)
    assert isinstance(norm, RoundNorm)
    batch = (-1, 3, h, w) if mixing == "shared" else (-1, 3 * C, h, w)
    seen: list[Tensor] = []

    def fold(*windows: Tensor) -> Tensor:
        hidden = conv1(torch.stack(windows).reshape(batch))
        seen.append(hidden.transpose(0, 1).flatten(1))  # (K, values)
        mean, var = seen[-1].mean(1), seen[-1].var(1, correction=0)
        scale = norm.weight / (var + 1e-5).sqrt()
        y = (hidden - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        return conv2(relu(y)).reshape(-1, C, h, w)  # type: ignore[no-any-return]

    def window(x: Tensor, j: int) -> Tensor:
        return x[j : j + 3].transpose(0, 1)  # (C, 3, h, w)

    a, b = bags.bag(0), bags.bag(1)
    first = fold(*[window(a, j) for j in range(3)], *[window(b, j) for j in range(2)])
    second = fold(window(first[:3], 0))
    expected = torch.stack([second[0].mean((1, 2)), first[3:].mean((0, 2, 3))])

    assert close(aggregator(bags).embedding, expected, 1e-10)
    (own,) = norms_of(aggregator)
    assert_moved(own, norm, seen)


def test_round_scope_gradients_are_those_of_the_formula() -> None:
    aggregator = random_dragn((2, 1, 2), unit="L3Agg", bn="on").double().train()
    bags = draw((2, 1, 2), [5, 4, 1], dtype=torch.float64)

    def embed(values: Tensor) -> Tensor:
        result: Tensor = aggregator(RaggedBags(values, bags.offsets)).embedding
        return result

    assert torch.autograd.gradcheck(embed, (bags.values.requires_grad_(),))


@pytest.mark.parametrize("scope", ["round", "window"])
def test_bags_that_never_meet_the_unit_leave_its_statistics_alone(scope: str) -> None:
    aggregator = dragn((5, 2, 3), bn="on", bn_scope=scope).train()
    before = {key: value.clone() for key, value in aggregator.state_dict().items()}
    bags = draw((5, 2, 3), [1, 2, 2])
    embedding = aggregator(bags).embedding
    for key, value in aggregator.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(embedding[0], bags.bag(0)[0].mean((1, 2)))
    assert torch.allclose(embedding[1], bags.bag(1).mean((0, 2, 3)))


@pytest.mark.parametrize("scope", ["round", "window"])
def test_a_frozen_unit_keeps_its_statistics_while_the_rest_trains(scope: str) -> None:
    aggregator = dragn((5, 2, 3), bn="on", bn_scope=scope).train()
    aggregator.unit.eval()
    before = {key: value.clone() for key, value in aggregator.state_dict().items()}
    aggregator(draw((5, 2, 3)))
    for key, value in aggregator.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_unit_called_by_itself_is_made_of_pytorchs_layers() -> None:
    unit = random_dragn((5, 2, 3), bn="on", bn_scope="window").unit.train()
    plain = plain_copy(unit)
    x = torch.randn(11, 3, 2, 3, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(unit(x), plain(x), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(unit.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 4, 10), (2, 7, 9), (3, 8, 8), (1, 5, 13)])
def test_a_units_convolution_equals_pytorchs_on_small_and_large_maps(
    shape: tuple[int, int, int],
) -> None:
    K, height, width = shape
    conv = UnitConv(K, 2, 5, padding=2).double()
    x = torch.randn(11, K, height, width, dtype=torch.float64, requires_grad=True)
    ours, theirs = conv(x), torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    seed = torch.randn_like(ours)
    inputs = (x, conv.weight, conv.bias)
    for got, wanted in zip(
        torch.autograd.grad(ours, inputs, seed),
        torch.autograd.grad(theirs, inputs, seed),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scope", ["round", "window"])
@pytest.mark.parametrize(
    ("in_shape", "mixing"), [((1,), "shared"), ((8,), "per_channel"), ((5, 1, 1), "full")]
)
def test_there_is_no_batch_norm_over_one_value(
    in_shape: tuple[int, ...], mixing: str, scope: str
) -> None:
    with pytest.raises(InputError, match="bn"):
        dragn(in_shape, mixing=mixing, bn_scope=scope, bn=True)
    aggregator = dragn(in_shape, mixing=mixing, bn_scope=scope, bn="auto").train()
    assert not list(aggregator.unit.norms)
    assert aggregator(draw(in_shape, [3])).embedding.isfinite().all()


@pytest.mark.parametrize("unit", ["L1Agg", "L2Agg"])
@pytest.mark.parametrize("order", ["given", "permuted", "clustered"])
def test_short_bags_may_be_repeated_and_long_ones_thinned(unit: str, order: str) -> None:
    in_shape = (5, 2, 3)
    options: dict[str, Any] = {"unit": unit, "init": "default", "order": order}
    plain = dragn(in_shape, **options).eval()
    bags = draw(in_shape, [1, 2, 3, 4, 5, 11])
    sizes = [1, 2, 3, 4, 5, 11]
    for short, cap in (("repeated", None), ("kept", 4), ("repeated", 4)):
        changed = dragn(in_shape, **options, short=short, cap=cap).eval()
        changed.load_state_dict(plain.state_dict())
        got = changed(bags).embedding
        for k, n in enumerate(sizes):
            alone = changed(bags.select(torch.tensor([k]))).embedding[0]
            torch.testing.assert_close(got[k], alone, rtol=1e-5, atol=1e-6)
            if order == "given":
                wanted = list(range(n))
                if n < 3 and short == "repeated":
                    wanted = [0, 0, 0] if n == 1 else [0, 1, 0]
                if n > 4 and cap == 4:
                    wanted = [0, 1, 2, 3] if n == 5 else [0, 2, 5, 8]
                rows = bags.values[int(bags.offsets[k]) + torch.tensor(wanted)]
                by_hand = plain(RaggedBags(rows, torch.tensor([0, len(rows)]))).embedding[0]
                torch.testing.assert_close(got[k], by_hand, rtol=1e-5, atol=1e-6)


def test_a_cap_keeps_an_order_by_clustering_independent_of_the_callers() -> None:
    in_shape = (4, 2, 2)
    aggregator = dragn(in_shape, order="clustered", cap=5, init="default").eval()
    bags = draw(in_shape, [9, 2])
    turned = RaggedBags(bags.values[torch.tensor([8, 3, 0, 7, 1, 6, 2, 5, 4, 10, 9])], bags.offsets)
    assert not aggregator.order_sensitive
    assert dragn(in_shape, order="clustered", short="repeated").order_sensitive
    torch.testing.assert_close(aggregator(bags).embedding, aggregator(turned).embedding)


@pytest.mark.parametrize(
    ("unit", "bn", "parameters"),
    [
        ("L1Agg", None, 28),
        ("L2Agg", False, 112),
        ("L2Agg", None, 112 + 6),
        ("L3Agg", False, 196),
        ("L3Agg", None, 196 + 12),
        ("L3Agg", True, 196 + 12),
    ],
)
def test_parameter_counts(unit: str, bn: bool | None, parameters: int) -> None:
    aggregator = dragn((17, 2, 3), unit=unit, bn=bn)
    assert sum(p.numel() for p in aggregator.parameters()) == parameters
    assert aggregator.unit(torch.zeros(7, 3, 5, 2)).shape == (7, 1, 5, 2)


@pytest.mark.parametrize(
    ("mixing", "parameters"),
    [("per_channel", 5 * 112), ("full", 9 * 15 * 15 + 15 + 9 * 15 * 5 + 5)],
)
def test_parameter_counts_of_other_mixings(mixing: str, parameters: int) -> None:
    aggregator = dragn((5, 2, 3), unit="L2Agg", mixing=mixing, bn=False)
    assert sum(p.numel() for p in aggregator.parameters()) == parameters
    assert aggregator.unit(torch.zeros(7, 15, 2, 3)).shape == (7, 5, 2, 3)


def recursive_mean(rows: Tensor) -> Tensor:
    while len(rows) > 2:
        rows = (rows[:-2] + rows[1:-1] + rows[2:]) / 3
    return rows.mean(0)


@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize("mixing", ["shared", "per_channel", "full"])
@pytest.mark.parametrize("unit", ["L1Agg", "L2Agg", "L3Agg"])
def test_mean_init_is_the_recursive_mean(unit: str, mixing: str, kernel: int) -> None:
    in_shape = (5, 2, 3)
    aggregator = dragn(in_shape, unit=unit, mixing=mixing, kernel=kernel, bn=False)
    bags = draw(in_shape)
    bags = RaggedBags(bags.values.abs(), bags.offsets)
    embedding = aggregator(bags).embedding
    for i in range(len(bags)):
        assert torch.allclose(embedding[i], recursive_mean(bags.bag(i)).mean((1, 2)), rtol=1e-5)


def test_mean_init_weighs_nine_instances_by_trinomial_coefficients() -> None:
    bags = draw((1, 1, 1), [9])
    bags.values.requires_grad_()
    dragn((1, 1, 1), unit="L1Agg")(bags).embedding.sum().backward()
    assert bags.values.grad is not None
    weights = bags.values.grad.flatten()
    assert torch.allclose(weights * 81, torch.tensor([1.0, 4, 10, 16, 19, 16, 10, 4, 1]))
    spec = torch.tensor([0.012, 0.049, 0.123, 0.198, 0.235, 0.198, 0.123, 0.049, 0.012])
    assert torch.allclose(weights, spec, atol=5e-4)


def test_mean_init_lets_hidden_channels_separate() -> None:
    aggregator = dragn((5, 2, 3), unit="L2Agg", bn=False)
    bags = draw((5, 2, 3))
    aggregator(RaggedBags(bags.values.abs(), bags.offsets)).embedding.square().sum().backward()
    # Were the hidden channels alike, the last layer's gradient would be alike in all three.
    *_, last = aggregator.unit.children()
    assert isinstance(last.weight, Tensor)
    assert last.weight.grad is not None
    a, b, c = last.weight.grad[0]
    assert not torch.allclose(a, b)
    assert not torch.allclose(b, c)
    assert not torch.allclose(a, c)


def test_rounds_are_planned_by_hand() -> None:
    """Bags of 5, 2 and 4: rows 0-4, 5-6, 7-10; then 3 and 2 windows; then 1."""
    first, second, third = plan_rounds(torch.tensor([5, 2, 4])).rounds
    assert (first.finished.tolist(), first.last_rows.tolist()) == ([1], [[5, 6]])
    assert first.members.tolist() == [[k, k + 1, k + 2] for k in (0, 1, 2, 7, 8)]
    assert first.loop_index.tolist() == [0, 1, 2, 4, 5]
    assert (second.finished.tolist(), second.last_rows.tolist()) == ([2], [[3, 4]])
    assert (second.members.tolist(), second.loop_index.tolist()) == ([[0, 1, 2]], [3])
    assert (third.finished.tolist(), third.last_rows.tolist()) == ([0], [[0, 0]])
    assert third.members.tolist() == third.loop_index.tolist() == []


def test_each_window_has_its_place_in_the_loop() -> None:
    rounds = plan_rounds(torch.tensor(SIZES)).rounds
    indices = torch.cat([r.loop_index for r in rounds])
    assert indices.sort().values.tolist() == list(range(sum((n - 1) ** 2 // 4 for n in SIZES)))
    assert torch.cat([r.finished for r in rounds]).sort().values.tolist() == list(range(len(SIZES)))


def test_the_unit_is_called_once_per_round_on_windows_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "kernels", lambda *size: None)  # as without a compiler
    aggregator = dragn((5, 2, 3), unit="L2Agg", bn=False)
    batches: list[int] = []
    aggregator.unit.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    aggregator(draw((5, 2, 3), [1, 7, 2, 4]))
    assert batches == [5 * (5 + 2), 5 * 3, 5 * 1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"unit": "L4Agg"}, "option unit: expected L1Agg, L2Agg or L3Agg, got 'L4Agg'"),
        ({"mixing": "none"}, "option mixing: .* got 'none'"),
        ({"kernel": 2}, "option kernel: expected 1, 3, 5 or 7, got 2"),
        ({"kernel": True}, "option kernel: .* got True"),
        ({"bn": 1}, "option bn: expected off, on or auto, got 1"),
        (
            {"bn": True, "unit": "L1Agg"},
            "option bn: expected off or auto with unit=L1Agg",
        ),
        ({"short": "padded"}, "option short: .* got 'padded'"),
        ({"cap": 0}, "option cap: .* got 0"),
        ({"unit": [1]}, "unit"),
        ({"bn_scope": "bag"}, "option bn_scope: .* got 'bag'"),
        ({"init": "zeros"}, "option init: .* got 'zeros'"),
        ({"share_rounds": "no"}, "option share_rounds: .* got 'no'"),
        (
            {"share_rounds": False},
            "option rounds: expected a whole .* with share_rounds=false, got None",
        ),
        ({"share_rounds": False, "rounds": 0}, "option rounds: .* got 0"),
        ({"rounds": 3}, "option rounds: expected no value with share_rounds=true, got 3"),
    ],
)
def test_options_that_are_not_allowed(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        create_aggregator("dragn", in_shape=(5, 2, 3), **options)


def test_combinations_of_options_all_train() -> None:
    bags = draw((5, 2, 3), [1, 2, 3, 6])
    for unit, mixing, scope in product(
        ("L1Agg", "L2Agg", "L3Agg"), ("shared", "per_channel", "full"), ("round", "window")
    ):
        aggregator = dragn((5, 2, 3), unit=unit, mixing=mixing, bn_scope=scope).train()
        aggregator(bags).embedding.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in aggregator.parameters())
