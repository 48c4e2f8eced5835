"""Training where the bags are not on the CPU: every tensor is made where it is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import DEVICE, Remote, elsewhere, values_of
from run_stores import make_data
from small_aggregators import AGGREGATORS, LABELS, MAP, VECTOR, draw, make, relative, supervise

from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags
from dragn_cache.runs.explain import choose_method
from dragn_cache.runs.instance_scores import score_instances
from dragn_cache.training import stacked
from dragn_cache.training import train as training
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.losses import LOSSES
from dragn_cache.training.train import Trained, train

SIZES = [1, 2, 7, 4, 17, 11]
# Options that reach what a method's defaults leave out.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "bilstm": [{"hidden": 13}],
    "dragn": [
        {},
        {"order": "permuted"},
        {"order": "clustered"},
        {"unit": "L1Agg"},
        {"unit": "L1Agg", "order": "permuted"},
        {"unit": "L1Agg", "mixing": "per_channel"},
        {"mixing": "full", "bn_scope": "window"},
        {"share_rounds": False, "rounds": 2},
    ],
    "dtfd": [{"distill": "maxmin"}],
    "imploc": [{"readout": "cls"}],
    "netvlad": [{"clusters": 3, "pixels": True}],
    "set_transformer": [{"inducing": 3}],
    "spoc": [{"whiten": 3}],
    "transmil": [{"landmarks": 4}],
}


@pytest.fixture(scope="module")
def data() -> LabelledBags:
    return make_data()


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings find the other device, whatever they ask for."""
    for module in (training, stacked):
        monkeypatch.setattr(module, "find_device", lambda name: DEVICE)


def test_the_device_refuses_what_a_gpu_refuses() -> None:
    with elsewhere():
        x = torch.arange(7.0).to(DEVICE)
        assert isinstance(x, Remote)
        assert values_of(x[torch.tensor([5, 2])] * torch.tensor(2.0)).tolist() == [10, 4]
        assert isinstance(torch.zeros(3, device=DEVICE), Remote)
        assert not isinstance(x.cpu(), Remote)
        for mixture in (
            lambda: x + torch.ones(7),
            lambda: x.index_select(0, torch.tensor([5, 2])),
            lambda: torch.cat((x, torch.ones(2))),
            lambda: x.masked_fill(torch.ones(7, dtype=torch.bool), 0),
        ):
            with pytest.raises(RuntimeError, match="tensors on two devices"):
                mixture()


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
def test_a_step_elsewhere_is_a_step_here(name: str) -> None:
    in_shape = MAP if AGGREGATORS[name].needs == "map" else VECTOR
    bags, wanted = draw(in_shape, SIZES), supervise(len(SIZES))

    def step(aggregator: torch.nn.Module, bags: RaggedBags, wanted: Supervision) -> Any:
        aggregator.eval()  # with batch normalisation, rounding alone makes some gradients
        bags.values.requires_grad_()
        result = aggregator(bags, wanted)
        (result.embedding.sum() + (0 if result.loss is None else result.loss)).backward()
        return result

    here = make(name, in_shape)
    ours = step(here, bags, wanted)
    with elsewhere():
        moved = make(name, in_shape).to(DEVICE)
        targets = wanted.targets.to(DEVICE)
        theirs = step(moved, bags.to(device=DEVICE), Supervision(targets, wanted.criterion))
    assert relative(values_of(theirs.embedding.detach()), ours.embedding) < 1e-5
    for found, expected in ((theirs.attention, ours.attention), (theirs.loss, ours.loss)):
        assert (found is None) == (expected is None)
        if found is not None:
            assert relative(values_of(found.detach()), expected) < 1e-5
    for found, expected in zip(moved.parameters(), here.parameters(), strict=True):
        assert relative(values_of(found.grad), expected.grad) < 1e-3


CASES = [(name, options) for name in sorted(AGGREGATORS) for options in OPTIONS.get(name, [{}])]


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_training_and_looking_inside_elsewhere(
    data: LabelledBags, name: str, options: dict[str, Any]
) -> None:
    config = TrainConfig(
        aggregator=name, options=options, scale="standard", epochs=1, batch_size=41, dropout=0.3
    )
    with elsewhere():
        trained = train(data, config)
        assert not any(isinstance(x, Remote) for x in trained.model.state_dict().values())
        model = trained.model.to(DEVICE)
        few = data.bags.select([3, 0, 5]).to(device=DEVICE)  # type: ignore[union-attr]
        for method in (choose_method(model, "auto"), "leave-one-out"):
            scores = score_instances(model, few, data.task, method)
            assert len(scores) == int(few.offsets[-1])


@pytest.mark.parametrize(
    ("name", "loss"),
    [("acmil", "bce"), *(("mean", loss) for loss in sorted(set(LOSSES) - {"cross_entropy"}))],
)
def test_many_models_elsewhere(
    data: LabelledBags, name: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(aggregator=name, loss=loss, pos_weight="balanced", epochs=1)
    (ours,) = stacked.train_many(data, [config])
    for module in (training, stacked):
        monkeypatch.setattr(module, "find_device", lambda name: DEVICE)
    with elsewhere():
        (theirs,) = stacked.train_many(data, [config])
    assert isinstance(ours, Trained)
    assert isinstance(theirs, Trained)
    assert ours.probabilities.shape == (len(data.bags), LABELS)
    np.testing.assert_allclose(theirs.probabilities, ours.probabilities, atol=1e-5)
