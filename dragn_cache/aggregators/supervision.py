"""Targets and criterion that aggregators with losses of their own train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Criterion(Protocol):
    """Logits (M, L), targets (M, L) of 0 and 1, and weights (M, L) if any, to a scalar loss."""

    def __call__(
        self, logits: Tensor, targets: Tensor, weight: Tensor | None = None, /
    ) -> Tensor: ...


@dataclass(frozen=True)
class Supervision:
    """Targets and criterion of the B bags of a batch, for aggregators with losses of their own.

    Attributes:
        targets: (B, L) of 0 and 1, floating.
        criterion: the loss of the bags' own logits.
        weights: (B, L), what each label of each bag counts; None where all count 1.
    """

    targets: Tensor
    criterion: Criterion
    weights: Tensor | None = None

    def loss(self, logits: Tensor, owners: Tensor | None = None) -> Tensor:
        """The criterion on logits (M, L) of parts of the bags.

        Args:
            owners: (M,) int64: the bag, 0 to B - 1, that each row belongs to and whose targets and
                weights it has; None where row k is bag k.
        """
        targets, weights = self.targets, self.weights
        if owners is not None:
            chosen = owners.to(targets.device)
            targets = targets[chosen]
            weights = None if weights is None else weights[chosen]
        if weights is None:
            return self.criterion(logits, targets)
        return self.criterion(logits, targets, weights)
