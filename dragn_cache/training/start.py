"""The start of a training: the constant prediction that the training bags' labels ask for.

A head whose bias starts at 0 says one half for every label, and the loss then falls fastest along
any direction that all bags share: a bias moves by at most one learning rate a step, so the
aggregator is made into the missing offset, which for a recursion grows with the bag's size. So the
head, and every classifier inside an aggregator, starts at the logits of the least loss that one
prediction for all bags can have: the log-odds of each label for binary cross-entropy, the logarithm
of the classes' shares for cross-entropy, and with weights or other losses what these ask for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.training.model import BagClassifier

STEPS = 200


def best_constant(supervision: Supervision) -> Tensor:
    """(L,) float64: the logits of the least loss among those that are the same for all bags.

    Labels that all of the B bags have, or none, would be certain: logits end at ±log(2 B), as if
    half a bag were different.
    """
    targets = supervision.targets.double().cpu()
    weights = None if supervision.weights is None else supervision.weights.double().cpu()
    exact = Supervision(targets, supervision.criterion, weights)
    limit = math.log(2 * len(targets))
    start = torch.zeros(targets.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [start],
        max_iter=STEPS,
        tolerance_grad=1e-10,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = exact.loss(start.clamp(-limit, limit).expand_as(targets))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return start.detach().clamp(-limit, limit)


@torch.no_grad()
def start_at(model: BagClassifier, logits: Tensor) -> None:
    """Set the biases of a fresh model's head and of its aggregator's classifiers to logits (L,).

    A head without a bias for each label is left as it is.
    """
    bias = getattr(model.head, "bias", None)
    own = [bias] if isinstance(bias, nn.Parameter) and bias.shape == logits.shape else []
    for each in (*own, *model.aggregator.label_biases()):
        each.copy_(logits.to(each).repeat_interleave(len(each) // len(logits)))
