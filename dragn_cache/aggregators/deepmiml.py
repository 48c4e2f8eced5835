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
  none, whatever ``--dropout`` says.

Maps are averaged over h and w first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.old_options import check_count
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_max


class DeepMiml(Aggregator):
    """Embedding (B, L·K): a bag's largest score of each sub-concept, K neighbours to a label.

    Args:
        in_shape: (C, h, w) or (C,).
        labels: L.
        subconcepts: K, for each label.
    """

    needs: ClassVar[Literal["map", "vector", "any"]] = "any"
    order_sensitive: bool = False
    bag_weight: float = 0.0

    def __init__(self, in_shape: Sequence[int], *, labels: int, subconcepts: int = 20) -> None:
        super().__init__(in_shape)
        check_count("deepmiml", "labels", labels)
        check_count("deepmiml", "subconcepts", subconcepts)
        self.scores = nn.Linear(self.out_dim, labels * subconcepts)
        self.out_dim = labels * subconcepts

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
