"""Single instances: probabilities of bags and the loss of instances, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy_layers import (
    assert_close,
    instances_of,
    linear,
    random_bags,
    shaken,
    sigmoid,
    softmax,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.training.losses import create_loss

WIDTH, LABELS = 19, 3
SIZES = [5, 1, 13, 2, 3]


def make(**options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    return shaken(create_aggregator("si", in_shape=(WIDTH,), **options)).double().eval()


def supervise(bags: int, task: Any = "multilabel") -> Supervision:
    targets = torch.eye(LABELS)[torch.arange(bags) % LABELS]
    return Supervision(targets, create_loss("auto", task).at(1))


@pytest.mark.parametrize("test", ["max", "mean"])
def test_si_gives_the_maximum_or_mean_of_probabilities(test: str) -> None:
    bags = random_bags(SIZES, WIDTH, dtype=torch.float64)
    for task in ("multilabel", "multiclass"):
        si = make(labels=LABELS, test=test, task=task)
        w, embedding = weights_of(si), si.head(LABELS)(si(bags).embedding)
        for k, rows in enumerate(instances_of(bags)):
            logits = linear(w, "classify", rows)
            p = sigmoid(logits) if task == "multilabel" else softmax(logits)
            p = p.max(0) if test == "max" else p.mean(0)
            if task == "multilabel":
                assert_close(embedding[k].sigmoid(), p)
            else:
                assert_close(embedding[k].softmax(0), p / p.sum())


def test_si_has_finite_logits_where_probabilities_round_to_0_and_1() -> None:
    si = create_aggregator("si", in_shape=(1,), labels=1, test="mean")
    with torch.no_grad():
        si.get_parameter("classify.weight").fill_(1)
        si.get_parameter("classify.bias").fill_(0)
    bags = RaggedBags.from_list([torch.full((3, 1), 400.0), torch.full((2, 1), -300.0)])
    assert si(bags).embedding.flatten().tolist() == pytest.approx([400, -300])


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_si_trains_on_instances_with_their_bags_labels(task: str) -> None:
    si, bags = make(labels=LABELS, task=task), random_bags(SIZES, WIDTH, dtype=torch.float64)
    wanted = supervise(len(bags), task)
    result = si.train()(bags, wanted)
    w = weights_of(si)
    logits = linear(w, "classify", bags.values.numpy())
    y = np.repeat(wanted.targets.numpy(), SIZES, 0)
    if task == "multilabel":
        p = sigmoid(logits)
        expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    else:
        expected = -(y * np.log(softmax(logits))).sum(1).mean()
    assert si.bag_weight == 0
    assert result.loss is not None
    assert result.loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 3, "test": "min"}, "option test: expected max or mean, got 'min'"),
        ({"labels": 3, "task": "both"}, "option task: .* got 'both'"),
        ({"labels": True}, "option labels: .* got True"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("si", in_shape=(WIDTH,), **options)
