"""Aggregators of one's own, as a user names them: ``own_aggregators:Doubling``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from dragn_cache.aggregators import Aggregated
from dragn_cache.aggregators.abmil import Abmil
from dragn_cache.aggregators.mean import Mean
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags


class Doubling(Mean):
    """Adds the loss of its own first logits once more."""

    criteria: ClassVar[list[Any]] = []

    def supervised(self, bags: RaggedBags, supervision: Supervision) -> Aggregated:
        result = self.aggregate(bags)
        self.criteria.append(supervision.criterion)
        return result._replace(loss=supervision.loss(result.embedding[:, :3]))


class Careless(Mean):
    """Draws from torch's global generator."""

    @property
    def stackable(self) -> bool:
        return False

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        embedding = super().aggregate(bags).embedding
        dropped = torch.nn.functional.dropout(embedding, training=self.training)
        return Aggregated(dropped, None, dropped.square().mean())


class Branches(Mean):
    """Has an attention for each of three labels."""

    has_attention = True

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return Aggregated(super().aggregate(bags).embedding, self.vectors(bags)[:, :3])


class Among(Mean):
    """Says that its embedding lies among the features."""

    embedding_among_features = True


class Attending(Among):
    """Says that it weighs instances as well."""

    has_attention = True


class Demanding(Mean):
    """Has an option without a default."""

    def __init__(self, in_shape: Sequence[int], *, labels: int, factor: float = 1.0) -> None:
        super().__init__(in_shape)
        self.labels, self.factor = labels, factor


class Wider(Abmil):
    """Has an option besides those that it passes on."""

    def __init__(self, in_shape: Sequence[int], *, factor: int = 2, **options: Any) -> None:
        super().__init__(in_shape, **options)
        self.factor = factor
