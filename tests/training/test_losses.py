"""Losses: each formula against plain numpy, finite gradients, and what changes by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.training.losses import LOSSES, Frn, WeightedBce, create_loss
from dragn_cache.types import Task

M, L = 7, 5
WEIGHTS = np.array([0.5, 1.0, 4.0, 0.0, 2.5])
Array = NDArray[np.float64]


def task_of(name: str) -> Task:
    return LOSSES[name].task


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (M, L) of both signs and one-hot or free targets, in float64."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((M, L)) < 0.4).astype(float)
    return torch.from_numpy(rng.normal(0, 2, (M, L))), torch.from_numpy(targets)


def draw_for(name: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    logits, targets = draw(seed)
    if task_of(name) == "multiclass":
        targets = torch.eye(L, dtype=torch.float64)[torch.arange(M) % L]
    return logits, targets


# --- the formulas, in numpy --------------------------------------------------------------------


def np_bce(z: Array, y: Array, w: Array) -> Array:
    p = 1 / (1 + np.exp(-z))
    return -(w * y * np.log(p) + (1 - y) * np.log(1 - p))


def np_cross_entropy(z: Array, y: Array, w: Array) -> Array:
    softmax = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    # As M·L terms, so that a mean over them is one over M rows.
    return -L * y * np.log(softmax)


def np_focal(z: Array, y: Array, w: Array, alpha: float, gamma: float) -> Array:
    p = 1 / (1 + np.exp(-z))
    positive = -alpha * (1 - p) ** gamma * np.log(p)
    return y * w * positive - (1 - y) * (1 - alpha) * p**gamma * np.log(1 - p)


def np_frn(z: Array, y: Array, w: Array, gamma: float) -> Array:
    loss = np_bce(z, y, w)
    return (1 - np.exp(-loss)) ** gamma * loss


def np_fec(z: Array, y: Array, w: Array, alpha: float, gamma: float) -> Array:
    p = 1 / (1 + np.exp(-z))
    factor = np.ones_like(z)
    for j in range(z.shape[1]):
        fp = sum(y[:, j][p[:, j] > 0.5] == 0)
        fn = sum(y[:, j][p[:, j] < 0.5] == 1)
        tn, tp = sum(y[:, j] == 0) - fp, sum(y[:, j] == 1) - fn
        for i in range(len(z)):
            if y[i, j] == 0 and p[i, j] > 0.5:
                factor[i, j] += alpha * (fp / (tn + 1)) ** gamma
            if y[i, j] == 1 and p[i, j] < 0.5:
                factor[i, j] += alpha * (fn / (tp + 1)) ** gamma
    return factor * np_bce(z, y, w)


def np_asymmetric(
    z: Array, y: Array, w: Array, gamma_neg: float, gamma_pos: float, clip: float
) -> Array:
    p = 1 / (1 + np.exp(-z))
    shifted = np.maximum(p - clip, 0)
    negative = shifted**gamma_neg * np.log(1 - shifted)
    return -y * w * (1 - p) ** gamma_pos * np.log(p) - (1 - y) * negative


# (name, options, the formula's arguments at epoch 99)
Formula = Callable[..., Array]
CASES: list[tuple[str, dict[str, Any], Formula, dict[str, float]]] = [
    ("bce", {}, np_bce, {}),
    ("weighted_bce", {}, np_bce, {}),
    ("cross_entropy", {}, np_cross_entropy, {}),
    ("focal", {}, np_focal, {"alpha": 0.25, "gamma": 2}),
    ("focal", {"alpha": 0.7, "gamma": 0.5}, np_focal, {"alpha": 0.7, "gamma": 0.5}),
    ("frn", {}, np_frn, {"gamma": 2}),
    ("frn", {"gamma": 1.5}, np_frn, {"gamma": 1.5}),
    ("fec", {}, np_fec, {"alpha": 4, "gamma": 1}),
    ("fec", {"alpha": 2, "gamma": 0.5}, np_fec, {"alpha": 2, "gamma": 0.5}),
    ("asymmetric", {}, np_asymmetric, {"gamma_neg": 4, "gamma_pos": 0, "clip": 0.05}),
    (
        "asymmetric",
        {"gamma_neg": 0.5, "gamma_pos": 1, "clip": 0.2},
        np_asymmetric,
        {"gamma_neg": 0.5, "gamma_pos": 1, "clip": 0.2},
    ),
    (
        "asymmetric",
        {"gamma_neg": 3, "clip": 0},
        np_asymmetric,
        {"gamma_neg": 3, "gamma_pos": 0, "clip": 0},
    ),
]
every_case = pytest.mark.parametrize(("name", "options", "formula", "arguments"), CASES)
every_loss = pytest.mark.parametrize("name", list(LOSSES))


@every_case
@pytest.mark.parametrize("weighted", [False, True])
def test_each_loss_is_its_formula(
    name: str,
    options: dict[str, Any],
    formula: Formula,
    arguments: dict[str, float],
    weighted: bool,
) -> None:
    logits, targets = draw_for(name)
    loss = create_loss(name, task_of(name), options)
    criterion = loss.at(99, torch.from_numpy(WEIGHTS) if weighted else None)
    weights = WEIGHTS if weighted else np.ones(L)
    expected = formula(logits.numpy(), targets.numpy(), weights, **arguments).mean()
    assert criterion(logits, targets).item() == pytest.approx(expected, rel=1e-12)


def test_every_loss_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(LOSSES)


@every_case
def test_an_entry_of_weight_0_counts_nothing(
    name: str, options: dict[str, Any], formula: Formula, arguments: dict[str, float]
) -> None:
    """Its logit moves neither the loss nor any gradient; the divisor stays M·L."""
    logits, targets = draw_for(name)
    criterion = create_loss(name, task_of(name), options).at(99)
    weight = torch.ones(M, L, dtype=torch.float64)
    assert criterion(logits, targets, weight) == pytest.approx(criterion(logits, targets).item())
    if task_of(name) == "multiclass":
        weight[3] = 0
    else:
        weight[3], weight[:, 1] = 0, 0
    results = []
    for change in (0.0, 5.0):
        z = (logits + change * (1 - weight)).requires_grad_()
        value = criterion(z, targets, weight)
        value.backward()
        assert z.grad is not None
        assert not z.grad[weight == 0].any()
        results.append((value.detach(), z.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)
    terms = formula(
        logits[weight[:, 0] > 0].numpy(),
        targets[weight[:, 0] > 0].numpy(),
        np.ones(L),
        **arguments,
    )
    terms *= weight[0].numpy()
    assert results[0][0].item() == pytest.approx(terms.sum() / (M * L), rel=1e-12)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_extreme_logits(
    name: str,
    options: dict[str, Any],
    formula: Formula,
    arguments: dict[str, float],
    dtype: torch.dtype,
) -> None:
    _, targets = draw_for(name)
    for size in (0.0, 30.0, 100.0, 1000.0):
        signs = torch.where(
            torch.rand(M, L, generator=torch.Generator().manual_seed(1)) < 0.5, 1, -1
        )
        logits = (size * signs).to(dtype).requires_grad_()
        for epoch in (1, 5, 99):
            loss = create_loss(name, task_of(name), options)
            value = loss.at(epoch, torch.from_numpy(WEIGHTS).to(dtype))(logits, targets)
            (gradient,) = torch.autograd.grad(value, logits)
            assert value.dtype == dtype
            assert value.isfinite()
            assert gradient.isfinite().all()


@every_case
def test_the_gradient_is_that_of_the_loss(
    name: str, options: dict[str, Any], formula: Formula, arguments: dict[str, float]
) -> None:
    """But for FECLoss, whose factor is a constant, and is one between errors' changes."""
    logits, targets = draw_for(name)
    criterion = create_loss(name, task_of(name), options).at(99)
    assert torch.autograd.gradcheck(lambda z: criterion(z, targets), logits.requires_grad_())


def test_known_relations() -> None:
    logits, targets = draw()
    plain = create_loss("bce", "multilabel").at(1)(logits, targets)
    half = create_loss("focal", "multilabel", {"gamma": 0, "alpha": 0.5}).at(1)(logits, targets)
    assert half.item() == pytest.approx(plain.item() / 2, rel=1e-12)
    for name, options in (
        ("focal", {"gamma": 0, "alpha": None}),
        ("fec", {"alpha": 0}),
        ("asymmetric", {"gamma_neg": 0, "clip": 0}),
    ):
        found = create_loss(name, "multilabel", options).at(1)(logits, targets)
        assert found.item() == pytest.approx(plain.item(), rel=1e-12), name
    focal = create_loss("focal", "multilabel", {"alpha": None}).at(1)(logits, targets)
    assert create_loss("frn", "multilabel").at(99)(logits, targets).item() == pytest.approx(
        focal.item(), rel=1e-12
    )


# --- what changes by epoch ---------------------------------------------------------------------


def test_frns_focus_grows_from_1_over_the_first_10_epochs() -> None:
    loss = Frn()
    for e in range(10):
        assert loss.focus(e + 1) == pytest.approx(1 + (1 - math.cos(math.pi * e / 10)) / 2)
    assert [loss.focus(epoch) for epoch in (1, 11, 12, 60)] == [1, 2, 2, 2]
    assert Frn(gamma=3, anneal=4).focus(3) == pytest.approx(2)  # half way
    assert Frn(gamma=3, anneal=0).focus(1) == 3
    logits, targets = draw()
    early = loss.at(1)(logits, targets).item()
    assert early == pytest.approx(np_frn(logits.numpy(), targets.numpy(), np.ones(L), 1).mean())


@pytest.mark.parametrize("half_period", [10, 30])
def test_weights_are_tempered_from_epoch_40_to_85(half_period: int) -> None:
    loss = WeightedBce(temper=half_period)
    shares = [loss.share(e + 1) for e in range(100)]
    assert shares[:41] == [1.0] * 41
    for e in range(40, 86):
        assert shares[e] == pytest.approx((1 + math.cos(math.pi * (e - 40) / half_period)) / 2)
    assert shares[40 + half_period] == pytest.approx(0)
    assert shares[86:] == [shares[85]] * 14
    weights = torch.from_numpy(WEIGHTS)
    tempered = loss.tempered(49, weights)
    assert tempered is not None
    np.testing.assert_allclose(tempered, 1 + shares[48] * (WEIGHTS - 1))
    assert loss.tempered(49, None) is None
    untempered = WeightedBce().tempered(49, weights)
    assert untempered is not None
    assert torch.equal(untempered, weights)


# --- by name -----------------------------------------------------------------------------------


def test_auto_follows_the_task() -> None:
    assert create_loss("auto", "multilabel") == create_loss("bce", "multilabel")
    assert create_loss("auto", "multiclass") == create_loss("cross_entropy", "multiclass")


@every_loss
def test_a_loss_of_the_other_task_is_refused(name: str) -> None:
    other: Task = "multiclass" if task_of(name) == "multilabel" else "multilabel"
    message = rf"^loss: expected a loss for a {other} task, got {name}, .*choose auto or one of: "
    with pytest.raises(InputError, match=message):
        create_loss(name, other)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "focal",
            {"gama": 2},
            "loss focal: expected a known option, got 'gama'; did you mean gamma",
        ),
        ("bce", {"gamma": 2}, "loss bce: expected a known option, got 'gamma'; there are none"),
        ("auto", {"gamma": 2}, "loss bce: expected a known option"),
        ("focal", {"gamma": -1}, "loss focal, option gamma: expected a number from 0 to 100, .*-1"),
        ("focal", {"gamma": True}, "loss focal, option gamma: expected a number .* got True"),
        ("focal", {"gamma": "x"}, "loss focal, option gamma: expected a number .* got 'x'"),
        ("focal", {"alpha": 2}, "loss focal, option alpha: expected a number from 0 to 1, got 2"),
        ("frn", {"gamma": 0.5}, "loss frn, option gamma: expected a number from 1 to 100, got 0.5"),
        ("frn", {"anneal": 1.5}, "loss frn, option anneal: expected a whole number of at least 0"),
        (
            "frn",
            {"temper": 0},
            "loss frn, option temper: expected a number from 1 to 1000000, got 0",
        ),
        (
            "weighted_bce",
            {"temper_to": 3},
            "loss weighted_bce, option temper_to: expected a whole number of at l.* 40",
        ),
        ("fec", {"gamma": 0}, "loss fec, option gamma: expected a number from 0.001 to 100, got 0"),
        (
            "asymmetric",
            {"clip": 1},
            "loss asymmetric, option clip: expected a number from 0 to 0.99",
        ),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        create_loss(name, "multilabel", options)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean focal"):
        create_loss("focall", "multilabel")


# --- parts of bags -----------------------------------------------------------------------------


def test_parts_have_their_owners_targets_and_weights() -> None:
    logits, _ = draw()
    _, targets = draw(1)
    targets, weights = targets[:3], torch.rand(3, L, dtype=torch.float64)
    owners = torch.tensor([2, 0, 0, 1, 2, 2, 1])
    criterion = create_loss("focal", "multilabel").at(1)
    for given in (None, weights):
        wanted = Supervision(targets, criterion, given)
        expected = (
            criterion(logits, targets[owners])
            if given is None
            else criterion(logits, targets[owners], given[owners])
        )
        assert torch.equal(wanted.loss(logits, owners), expected)
        assert torch.equal(
            wanted.loss(logits[:3]), wanted.loss(logits[:3], torch.tensor([0, 1, 2]))
        )
