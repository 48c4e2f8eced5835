"""Where trainings start: the constant prediction of least loss, in every head and classifier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from run_stores import make_data
from torch import Tensor, nn

from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.losses import LOSSES, create_loss
from dragn_cache.training.model import BagClassifier, build_model
from dragn_cache.training.stacked import train_many
from dragn_cache.training.start import best_constant, start_at
from dragn_cache.training.train import Trained, train
from dragn_cache.types import Task

POSITIVES, BAGS = (3, 11, 17), 23


def targets() -> Tensor:
    """(23, 3) with 3, 11 and 17 positives."""
    return torch.stack([(torch.arange(BAGS) < n).float() for n in POSITIVES], dim=1)


def test_binary_cross_entropy_starts_at_the_log_odds() -> None:
    logits = best_constant(Supervision(targets(), create_loss("bce", "multilabel").at(1)))
    by_hand = [np.log(n / (BAGS - n)) for n in POSITIVES]
    np.testing.assert_allclose(logits.numpy(), by_hand, atol=1e-5)


def test_cross_entropy_starts_at_the_classes_shares() -> None:
    classes = torch.tensor([0] * 5 + [1] * 2 + [2] * 13)
    one_hot = nn.functional.one_hot(classes).float()
    logits = best_constant(Supervision(one_hot, create_loss("cross_entropy", "multiclass").at(1)))
    np.testing.assert_allclose(logits.softmax(0).numpy(), [5 / 20, 2 / 20, 13 / 20], atol=1e-5)


def test_weights_of_positives_and_of_bags_count() -> None:
    weight = torch.tensor([4.0, 1.0, 0.5])
    criterion = create_loss("bce", "multilabel").at(1, weight)
    logits = best_constant(Supervision(targets(), criterion))
    pairs = zip(POSITIVES, weight.tolist(), strict=True)
    by_hand = [np.log(w * n / (BAGS - n)) for n, w in pairs]
    np.testing.assert_allclose(logits.numpy(), by_hand, atol=1e-5)
    masked = torch.ones(BAGS, 3)
    masked[2:8, 0] = 0  # one of three positives is left, and 15 negatives
    masked[:, 1] = 0  # nothing is known of the second label
    logits = best_constant(Supervision(targets(), criterion, masked))
    assert logits[0].item() == pytest.approx(np.log(4 * 2 / 15), abs=1e-5)
    assert logits[1].item() == 0


@pytest.mark.parametrize("name", [n for n, loss in LOSSES.items() if loss.task == "multilabel"])
def test_no_other_constant_has_a_smaller_loss(name: str) -> None:
    weight = torch.tensor([6.0, 1.1, 0.4]) if LOSSES[name].balanced else None
    supervision = Supervision(targets(), create_loss(name, "multilabel").at(1, weight))
    logits = best_constant(supervision)
    grid = torch.linspace(-3.5, 3.5, 281, dtype=torch.float64)
    losses = [supervision.loss((logits * 0 + c).expand(BAGS, 3)).item() for c in grid]
    assert supervision.loss(logits.expand(BAGS, 3)).item() <= min(losses) + 1e-9
    for label in range(3):
        for step in (-0.05, 0.05):
            moved = logits.clone()
            moved[label] += step
            assert supervision.loss(moved.expand(BAGS, 3)) > supervision.loss(
                logits.expand(BAGS, 3)
            )


def test_labels_that_all_bags_have_or_none_stay_finite() -> None:
    y = targets()
    y[:, 0], y[:, 2] = 0, 1
    logits = best_constant(Supervision(y, create_loss("bce", "multilabel").at(1)))
    limit = np.log(2 * BAGS)
    np.testing.assert_allclose(logits.numpy(), [-limit, np.log(11 / 12), limit], atol=1e-4)


NETWORKS = ["dragn", "mean", "abmil", "clam_sb", "clam_mb", "acmil", "dsmil", "dtfd", "si"]


@pytest.mark.parametrize("name", [*NETWORKS, "deepmiml"])
@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_every_classifier_starts_there(name: str, task: Task) -> None:
    """Of features that are all zero a classifier sees its biases alone."""
    config = TrainConfig(aggregator=name, dropout=0.0)
    model = build_model(config, (7,), 3, task)
    logits = torch.tensor([-1.25, 0.5, -0.75])
    for parameter in model.parameters():  # biases of hidden layers would be seen as well
        parameter.data.mul_(parameter.dim() > 1)
    start_at(model, logits)
    values = torch.zeros(6, 7)
    bags = RaggedBags(values, torch.tensor([0, 1, 4, 6]))
    model.eval()
    expected = logits.log_softmax(0) if (name, task) == ("si", "multiclass") else logits
    torch.testing.assert_close(model(bags)[0], expected.expand(3, 3))
    seen: list[Tensor] = []

    def criterion(z: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        seen.append(z)
        return z.sum() * 0

    model.train()
    model(bags, supervision=Supervision(torch.eye(3), criterion))
    for z in seen:
        torch.testing.assert_close(z, logits.expand_as(z))
    inside = {"acmil", "dsmil", "dtfd", "si", "deepmiml"}
    assert bool(seen) == (name in inside) == bool(model.aggregator.label_biases())


class Bare(nn.Module):
    """A head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x)
        return logits


def test_a_head_without_biases_is_left_alone() -> None:
    model: BagClassifier = build_model(TrainConfig(aggregator="mean"), (7,), 3)
    model.head = Bare()
    before = model.head.layer.weight.clone()
    start_at(model, torch.ones(3))
    assert torch.equal(model.head.layer.weight, before)


def rare(count: int = 41) -> LabelledBags:
    data = make_data(count=count)
    targets = np.zeros_like(data.targets)
    targets[::7, 0], targets[1::3, 1], targets[2::9, 2] = 1, 1, 1
    return replace(data, targets=targets)


def test_training_starts_at_the_training_bags_log_odds() -> None:
    """Without a step the first epoch's losses are those of the start."""
    data = rare()
    config = TrainConfig(aggregator="mean", epochs=1, lr=0.0, dropout=0.0, batch_size=1000)
    trained = train(data, config)
    given = data.targets[data.rows("train")]
    odds = given.sum(0) / (len(given) - given.sum(0))
    bias = trained.model.head.bias
    np.testing.assert_allclose(bias.detach().numpy(), np.log(odds), atol=1e-4)
    other = config.replace(seed=3, shuffle_seed=0, pos_weight=4.0)
    together = train_many(data, [config.replace(shuffle_seed=0), other])
    alone = [train(data, config), train(data, other)]
    for one, two in zip(together, alone, strict=True):
        assert isinstance(one, Trained)
        torch.testing.assert_close(one.model.head.bias, two.model.head.bias)
    np.testing.assert_allclose(
        alone[1].model.head.bias.detach().numpy(), np.log(4 * odds), atol=1e-4
    )
