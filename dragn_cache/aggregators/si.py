"""SI: the single-instance baseline, a classifier of instances that are taken for bags.

The baseline of "DRAGN: Deep Recursively AggreGation Network": in training each instance has its
bag's labels and the loss is the mean over instances; a bag's prediction is, label by label, the
maximum over its instances' probabilities, or their mean with ``test="mean"``. The embedding is the
bag's logits (B, L), those whose probability is that:

- several labels, max: the largest logit, as a sigmoid rises with it;
- several labels, mean: log(mean p) − log(mean(1 − p)), exact for any logits;
- one label (``task="multiclass"``): the logarithm of the maximum or mean of the instances' softmax.
  The softmax of it is the mean itself, or the maxima divided by their sum, which the published
  maximum leaves as they are; the order of the classes is the same.

An aggregator does not see which task it is trained for, hence ``task``. The loss of the bags'
logits counts nothing in training (``bag_weight`` is 0), so there is no dropout before them either;
the history's losses are theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import SiOptions
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_logsumexp, segment_max


class Si(Aggregator, declared="si"):
    """Embedding (B, L): the bags' logits. No attention.

    Args:
        in_shape: (C, h, w), averaged over h and w, or (C,).
        options: `SiOptions`.
    """

    bag_weight: float = 0.0

    options: SiOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        self.classify = nn.Linear(self.out_dim, self.options.labels)
        self.out_dim = self.options.labels

    def label_biases(self) -> Sequence[Tensor]:
        return (self.classify.bias,)

    def head(self, labels: int) -> nn.Module:
        """The embedding is the logits already."""
        return nn.Identity()

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return Aggregated(self._of_bags(self.classify(self.vectors(bags)), bags), None)

    def supervised(self, bags: RaggedBags, supervision: Supervision) -> Aggregated:
        logits = self.classify(self.vectors(bags))
        loss = supervision.loss(logits, bags.segment_ids)
        return Aggregated(self._of_bags(logits, bags), None, loss)

    def _of_bags(self, logits: Tensor, bags: RaggedBags) -> Tensor:
        """(N, L) → (B, L)."""
        offsets = bags.offsets
        if self.options.task == "multiclass":
            logits = logits.log_softmax(1)
        if self.options.test == "max":
            return segment_max(logits, offsets)
        # Sums in place of means: the number of instances cancels, in the difference as in a
        # softmax.
        if self.options.task == "multiclass":
            return segment_logsumexp(logits, offsets)
        yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
        return segment_logsumexp(yes, offsets) - segment_logsumexp(no, offsets)
