"""DeepMIML against its formula in NumPy, and its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy_layers import (
    assert_close,
    instances_of,
    linear,
    random_bags,
    shaken,
    sigmoid,
    weights_of,
)

from dragn_cache.aggregators import Aggregator, create_aggregator
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.training.losses import create_loss

WIDTH, LABELS = 19, 3
SIZES = [5, 1, 13, 2, 3]


def make(**options: Any) -> Aggregator:
    """In evaluation mode and double precision, parameters off their start."""
    torch.manual_seed(3)
    return shaken(create_aggregator("deepmiml", in_shape=(WIDTH,), **options)).double().eval()


def supervise(bags: int) -> Supervision:
    targets = torch.eye(LABELS)[torch.arange(bags) % LABELS]
    return Supervision(targets, create_loss("auto", "multilabel").at(1))


def test_deepmiml_takes_maxima_over_subconcepts_and_instances() -> None:
    miml, bags = make(labels=LABELS, subconcepts=5), random_bags(SIZES, WIDTH, dtype=torch.float64)
    w, embedding = weights_of(miml), miml(bags).embedding
    assert miml.out_dim == 15
    expected = []
    for rows in instances_of(bags):
        scores = linear(w, "scores", rows).reshape(-1, LABELS, 5)
        expected.append(sigmoid(scores).max(2).max(0))
    assert_close(miml.head(LABELS)(embedding).sigmoid(), expected)
    assert not list(miml.head(LABELS).parameters())


def test_deepmimls_loss_is_that_of_its_undropped_logits() -> None:
    miml, bags = make(labels=LABELS), random_bags(SIZES, WIDTH, dtype=torch.float64)
    wanted = supervise(len(bags))
    result = miml.train()(bags, wanted)
    assert miml.bag_weight == 0
    assert result.loss is not None
    assert torch.equal(result.loss, wanted.loss(miml.head(LABELS)(result.embedding)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 3, "subconcepts": 0}, "option subconcepts: .* of at least 1, got 0"),
        ({"labels": 0}, "option labels: .* of at least 1, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_aggregator("deepmiml", in_shape=(WIDTH,), **options)
