"""What training minimises: losses of logits against 0/1 targets, and what a batch should become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dragn_cache.manifest import Task

Criterion = Callable[[Tensor, Tensor], Tensor]
"""Logits (M, L) and targets (M, L) of 0 and 1 to a scalar loss."""


@dataclass(frozen=True)
class Supervision:
    """What B bags of a batch should become, for aggregators with losses of their own.

    Attributes:
        targets: (B, L) of 0 and 1, floating.
        criterion: the loss of the bags' own logits.
    """

    targets: Tensor
    criterion: Criterion

    def loss(self, logits: Tensor, owners: Tensor | None = None) -> Tensor:
        """The criterion on logits (M, L) of parts of the bags.

        Args:
            owners: (M,) int64: the bag, 0 to B - 1, that each row belongs to and whose targets it
                has; None where row k is bag k.
        """
        targets = self.targets if owners is None else self.targets[owners.to(self.targets.device)]
        return self.criterion(logits, targets)


def bag_loss(
    logits: Tensor, targets: Tensor, task: Task, pos_weight: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy (multi-label) or cross-entropy (multi-class, one-hot targets), mean.

    ``pos_weight`` (L,) multiplies the positive terms of the binary one.
    """
    if task == "multilabel":
        weight = None if pos_weight is None else pos_weight.to(logits)
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits), pos_weight=weight)
    return F.cross_entropy(logits, targets.argmax(1))
