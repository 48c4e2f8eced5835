"""DeepMIML: every label has sub-concepts; the best one of the best instance speaks for the bag.

"Deep MIML Network" (Feng and Zhou, 2017): a linear layer (a 1×1 convolution over instances) scores
L·K sub-concepts of each instance, the maximum over K is the instance's score of a label, and the
maximum over instances the bag's. Both are maxima, so their order does not matter: the embedding is
the maximum over instances (B, L·K), label by label, and ``head`` takes the one over K.

- Several labels: the paper's sigmoid comes before the maxima and rises with the score, so the
  sigmoid of the maximum is the maximum of the sigmoids: binary cross-entropy of the embedding's
  logits is the paper's loss.
- One label (multi-class): there, each instance's scores go through a softmax over labels and the
  bag has the maximum over instances, max_k softmax(s_k), which does not add up to 1. Cross-entropy
  here has the softmax after the maxima, softmax(max_k s_k): the same for bags of one instance, not
  for others.
- Dropout before the head would fall on scores, not on features, and is not in the paper: there is
  none, whatever `dropout` says.

Maps are averaged over h and w first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import DeepMimlOptions
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_max


class DeepMiml(Aggregator, declared="deepmiml"):
    """Embedding (B, L·K): a bag's largest score of each sub-concept, K neighbours to a label.

    Args:
        in_shape: (C, h, w) or (C,).
        options: `DeepMimlOptions`.
    """

    bag_weight: float = 0.0

    options: DeepMimlOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        self.out_dim, width = self.options.labels * self.options.subconcepts, self.out_dim
        self.scores = nn.Linear(width, self.out_dim)

    def label_biases(self) -> Sequence[Tensor]:
        return (self.scores.bias,)

    def head(self, labels: int) -> nn.Module:
        return LargestSubconcept(labels)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return Aggregated(segment_max(self.scores(self.vectors(bags)), bags.offsets), None)

    def supervised(self, bags: RaggedBags, supervision: Supervision) -> Aggregated:
        result = self.aggregate(bags)
        logits = self.head(supervision.targets.shape[1])(result.embedding)
        return result._replace(loss=supervision.loss(logits))


class LargestSubconcept(nn.Module):
    """(B, L·K) → (B, L): each label's largest sub-concept. No parameters."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, scores: Tensor) -> Tensor:
        return scores.view(len(scores), self.labels, -1).amax(2)
