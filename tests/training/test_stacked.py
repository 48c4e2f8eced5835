"""Many models on one reading of each batch: each is what its own training gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from run_stores import make_data
from torch import Tensor

from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.training import stacked
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.model import Dropout, predict
from dragn_cache.training.stacked import Failed, StackedAdamW, require_stackable, train_many
from dragn_cache.training.train import Trained, train

BASE = TrainConfig(epochs=11, batch_size=8, lr=1e-2, dropout=0.3, shuffle_seed=3)
OWN: list[dict[str, Any]] = [
    {},
    {"lr": 3e-3, "seed": 1, "weight_decay": 0.3},
    {"dropout": 0.0, "seed": 2, "pos_weight": 2.5},
    {"dropout": 0.6, "seed": 5, "pos_weight": "balanced", "lr": 2e-2},
    {"seed": 7},
]
METHODS: dict[str, dict[str, Any]] = {
    "l1agg": {"options": {"unit": "L1Agg"}},
    "l1agg_per_channel": {"options": {"unit": "L1Agg", "mixing": "per_channel"}},
    # From the "mean" start, whose kernels have one weight each, BN makes that weight's gradient 0
    # but for rounding, of which Adam makes a whole step.
    "l2agg_bn": {"options": {"unit": "L2Agg", "init": "default"}},
    "l3agg": {"options": {"unit": "L3Agg", "bn": False}},
    "mean": {"aggregator": "mean"},
    "max": {"aggregator": "max", "scale": "standard"},
    "l1agg_scaled": {"options": {"unit": "L1Agg"}, "scale": "standard"},
}
every_method = pytest.mark.parametrize("method", list(METHODS))


@pytest.fixture(scope="module")
def data() -> LabelledBags:
    return make_data()


@pytest.fixture
def in_double() -> Iterator[None]:
    """Models made in float64, which they keep to."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def group(method: str, **shared: Any) -> list[TrainConfig]:
    configs = [BASE.replace(**METHODS[method], **shared, **own) for own in OWN]
    if method.startswith("l") and method != "l2agg_bn":  # initialisation is DRAGN's option
        options = {**cast("dict[str, Any]", configs[-1].options), "init": "default"}
        configs[-1] = configs[-1].replace(options=options)
    return configs


def both(
    data: LabelledBags, configs: list[TrainConfig]
) -> Iterator[tuple[Trained, Trained, NDArray[np.float64]]]:
    """Each model of a group, that of its own training, and the validation probabilities' gaps."""
    rows = data.rows("validation")
    for config, ours in zip(configs, train_many(data, configs), strict=True):
        single = train(data, config)
        assert isinstance(ours, Trained)
        yield ours, single, np.abs(ours.probabilities - single.probabilities)[rows]


def without_noise(ours: Trained, single: Trained) -> Trained:
    """Ours with the single model's biases of convolutions before BN, whose gradient is noise."""
    bias = "aggregator.units.0.0.bias"
    if "aggregator.units.0.1.running_mean" in ours.model.state_dict():
        ours.model.load_state_dict(
            {**ours.model.state_dict(), bias: single.model.state_dict()[bias]}
        )
    return ours


def state_gap(a: Trained, b: Trained) -> float:
    """Largest difference of a tensor, relative to its largest value, over all tensors."""
    gaps, ours = [], a.model.state_dict()
    for name, theirs in b.model.state_dict().items():
        difference = (ours[name].double() - theirs.double()).abs().max()
        gaps.append(float(difference / theirs.double().abs().max().clamp(min=1e-30)))
    return max(gaps)


@every_method
def test_after_one_step_each_model_is_its_own(data: LabelledBags, method: str) -> None:
    configs = group(method, epochs=1, batch_size=100)
    for ours, single, _ in both(data, configs):
        assert ours.history[0]["train_loss"] == pytest.approx(
            single.history[0]["train_loss"], rel=1e-6
        )
        # Adam's first step divides a gradient by itself: entries near 0 come out less exactly.
        assert state_gap(without_noise(ours, single), single) < 1e-4
        probabilities = predict(ours.model, data.bags, data.task)
        np.testing.assert_allclose(probabilities, single.probabilities, atol=1e-6)


@every_method
def test_after_the_whole_training_each_model_is_its_own(data: LabelledBags, method: str) -> None:
    # Before BN, Adam's steps follow the rounding errors of gradients that are 0 (docs/log.md): in
    # single precision two equal trainings part, by 1e-3 to 6e-3 depending on the processor's
    # instructions. The law in double precision is below.
    most = 2e-2 if method == "l2agg_bn" else 1e-3
    for ours, single, gap in both(data, group(method)):
        assert gap.max() < most
        assert ours.best_epoch == single.best_epoch
        assert [r["epoch"] for r in ours.history] == [r["epoch"] for r in single.history]


@every_method
@pytest.mark.usefixtures("in_double")
def test_in_double_precision_to_1e_8(data: LabelledBags, method: str) -> None:
    bags = data.bags.to(dtype=torch.float64)
    for ours, single, gap in both(replace(data, bags=bags), group(method)):
        assert next(ours.model.parameters()).dtype == torch.float64
        assert gap.max() < 1e-8
        assert state_gap(without_noise(ours, single), single) < 1e-6


def test_models_of_a_group_differ(data: LabelledBags) -> None:
    """Else the laws above would hold for one model trained K times."""
    results = [cast(Trained, r).probabilities for r in train_many(data, group("l1agg"))]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("views", ["random", "all"])
def test_classes_and_views(views: str) -> None:
    data = make_data("multiclass")
    training = data.bags.select(torch.from_numpy(data.rows("train")))
    values = torch.cat((data.bags.values, training.values.flip(-1), training.values.flip(-2)))
    sizes = [*data.bags.offsets.diff().tolist(), *training.offsets.diff().tolist() * 2]
    stacked = RaggedBags(values, torch.tensor([0, *np.cumsum(sizes)]))
    data = replace(data, bags=stacked.first(41), stacked=stacked)
    configs = [c.replace(pos_weight=None) for c in group("l1agg", views=views)]
    for _, _, gap in both(data, configs):
        assert gap.max() < 1e-3


@pytest.mark.parametrize("method", ["l1agg", "l3agg"])
@pytest.mark.parametrize("loss", ["frn", "fec", "asymmetric"])
def test_losses(data: LabelledBags, method: str, loss: str) -> None:
    for ours, single, gap in both(data, group(method, loss=loss, epochs=4)):
        assert gap.max() < 1e-3
        for a, b in zip(ours.history, single.history, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_one_that_diverges_is_marked_and_leaves_the_others_alone(data: LabelledBags) -> None:
    configs = [
        BASE.replace(aggregator="mean", epochs=60),
        BASE.replace(aggregator="mean", epochs=60, lr=1e3, weight_decay=1e3),
        BASE.replace(aggregator="mean", epochs=60, seed=2),
    ]
    seen: list[list[bool]] = []
    results = train_many(
        data, configs, progress=lambda rows: seen.append([row is not None for row in rows])
    )
    failed = results[1]
    assert isinstance(failed, Failed)
    with pytest.raises(type(failed.error), match=r"expected a finite loss.*\(now 1000\)") as single:
        train(data, configs[1])
    assert str(single.value).split(":")[0] == str(failed.error).split(":")[0]  # the same epoch
    assert len(seen) == 60
    assert seen[len(failed.history) - 1] == [True, True, True]
    assert seen[len(failed.history)] == [True, False, True]
    for k in (0, 2):
        alone = train(data, configs[k])
        np.testing.assert_allclose(
            cast(Trained, results[k]).probabilities, alone.probabilities, atol=1e-3
        )


def test_a_group_that_failed_altogether_ends_early(data: LabelledBags) -> None:
    broken = BASE.replace(aggregator="mean", epochs=500, lr=1e3, weight_decay=1e3)
    epochs: list[object] = []
    results = train_many(data, [broken, broken.replace(seed=4)], progress=epochs.append)
    assert all(isinstance(r, Failed) for r in results)
    assert len(epochs) < 500


def test_no_configuration_no_model(data: LabelledBags) -> None:
    assert train_many(data, []) == []


def test_each_batch_is_gathered_once_for_all(
    data: LabelledBags, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []
    select = RaggedBags.select

    def counting(self: RaggedBags, chosen: Tensor, **options: Any) -> RaggedBags:
        gathered.append(len(chosen))
        return select(self, chosen, **options)

    monkeypatch.setattr(RaggedBags, "select", counting)
    for method in ("l1agg", "l3agg"):
        train_many(data, group(method, epochs=2))
    validation = len(data.rows("validation"))  # not neighbours, so gathered as well
    assert gathered == [8, 8, 1, validation] * 4


def test_the_global_generator_is_left_alone(data: LabelledBags) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    train_many(data, group("mean", epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_methods_with_dropout_of_their_own_draw_as_they_would_alone(data: LabelledBags) -> None:
    own = "own_aggregators:Careless"
    for _, _, gap in both(data, [c.replace(aggregator=own) for c in group("mean")]):
        assert gap.max() < 1e-5


def test_on_a_gpu_models_have_both_generators_to_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masks of ACMIL and splits of DTFD are drawn on the CPU, dropout on the GPU."""
    on_gpu = [torch.tensor([5])]
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: on_gpu[0])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda x, device: on_gpu.__setitem__(0, x))
    gpu, before = torch.device("cuda"), torch.get_rng_state()
    first = stacked._rng_state(gpu)
    expected = torch.rand(3)
    on_gpu[0] = torch.tensor([7])
    stacked._set_rng_state(first, gpu)
    assert torch.equal(torch.rand(3), expected)
    assert on_gpu[0].item() == 5
    torch.set_rng_state(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 4}, "batch_size 8, as in configuration 0, got 4; train it by itself"),
        ({"epochs": 4}, "epochs 11, as in configuration 0, got 4"),
        ({"scale": "standard"}, "scale 'none', as in configuration 0, got 'standard'"),
        ({"aggregator": "max"}, "aggregator 'dragn', as in configuration 0, got 'max'"),
        ({"options": {"unit": "L1Agg"}}, r"options {}, as in configuration 0, got {'unit'"),
        ({"shuffle_seed": None, "seed": 6}, "shuffle_seed 3, .* got 6; give all the same shuffle"),
    ],
)
def test_what_may_not_differ_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^configuration 1 of a group: expected {message}"):
        require_stackable([BASE, BASE.replace(**change)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer 'adamw', which all models can share, got 'sgd'"),
        ({"schedule": "cosine"}, "schedule 'none', which all models can share, got 'cosine'"),
        ({"patience": 3}, "patience 0, which all models can share, got 3; train each by itself"),
    ],
)
def test_what_a_group_cannot_do_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^configuration 0 of a group: expected {message}"):
        require_stackable([BASE.replace(**change)] * 2)


def test_what_may_differ() -> None:
    require_stackable([BASE, BASE.replace(seed=3, shuffle_seed=None, options={"init": "default"})])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stacked_step_is_pytorchs(dtype: torch.dtype) -> None:
    """Two parameters, one of which has no gradient in the second of three steps."""
    generator = torch.Generator().manual_seed(0)
    rates, decays = [0.1, 0.003, 1.0], [0.0, 0.5, 0.01]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    stacked = [draw(3, 5, 2).requires_grad_(), draw(3).requires_grad_()]
    single = [[p.detach()[k].clone().requires_grad_() for p in stacked] for k in range(3)]
    ours = StackedAdamW(stacked, lr=rates, weight_decay=decays)
    theirs = [
        torch.optim.AdamW(p, lr=lr, weight_decay=wd)
        for p, lr, wd in zip(single, rates, decays, strict=True)
    ]
    for step in range(3):
        for i, parameter in enumerate(stacked):
            parameter.grad = None if (step, i) == (1, 1) else draw(*parameter.shape)
            for k in range(3):
                single[k][i].grad = None if parameter.grad is None else parameter.grad[k].clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for i, parameter in enumerate(stacked):
        expected = torch.stack([parameters[i].detach() for parameters in single])
        torch.testing.assert_close(parameter.detach(), expected, rtol=tolerance, atol=tolerance)


def test_dropout_keeps_the_expectation_and_draws_from_its_own_generator() -> None:
    x = torch.full((331, 307), 3.0)
    first, second, other = Dropout(0.3, seed=5), Dropout(0.3, seed=5), Dropout(0.3, seed=6)
    torch.manual_seed(1)
    dropped = first(x)
    torch.manual_seed(2)
    assert torch.equal(second(x), dropped)
    assert not torch.equal(other(x), dropped)
    assert not torch.equal(first(x), dropped)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(3.0 / 0.7).item()}
    assert (dropped == 0).double().mean() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(first.eval()(x), x)
