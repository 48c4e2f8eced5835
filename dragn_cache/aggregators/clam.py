"""CLAM: gated attention whose extremes teach instance classifiers; one branch, or one per label.

"Data-efficient and weakly supervised computational pathology on whole-slide images" (Lu et al.,
2021), both forms in one file because the paper has both:

- h = ReLU(W x + b), dropout; scores by gated attention (``layers.GatedScores``), dropout as well;
  a = softmax over the bag;
- ``clam_sb``: one a, embedding Σ a_k h_k, one linear classifier;
- ``clam_mb``: one a per label, embedding Σ a_kl h_k per label, and for each label a classifier of
  its own on its own embedding;
- instance loss: for a label that a bag has, its B instances of highest attention should be
  positive and its B of lowest negative, by cross-entropy of the label's two-class instance
  classifier on h, mean of the 2B; with ``subtyping``, for a label that a bag does not have, its B
  of highest attention should be negative;
- loss = 0.7 bag loss + 0.3 instance loss.

What differs. The published bag has exactly one class; here every label a bag has is "in class",
and a bag's instance loss is the mean over the labels that take part (those it has, all with
``subtyping``): for one class per bag, that is the published loss in both cases. B is at most half
of the bag, so that no instance is both; a bag of one instance, and a bag without a label where
there is no ``subtyping``, adds nothing. Both ends come from one order, ties by index. The instance
loss is cross-entropy; the authors' other choice, a smooth SVM, is left out. Attention scores have
no bias, which the softmax would cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import ClamOptions
from dragn_cache.aggregators.layers import GatedScores, in_blocks, relu_network
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import owners
from dragn_cache.ragged.segments import segment_attend, segment_ranks, segment_softmax, segment_sum


class ClamSb(Aggregator, declared="clam_sb"):
    """Embedding (B, D): each bag's attention-weighted mean; the attention is (N,).

    Args:
        in_shape: (C, h, w) or (C,); maps are averaged over h and w first.
        options: `ClamOptions`.
    """

    options: ClamOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        chosen = self.options
        self.bag_weight = 1 - chosen.instance_weight
        self.embed, width = relu_network(self.out_dim, chosen.embed)
        self.dropout = nn.Dropout(chosen.dropout)
        self.scores = GatedScores(width, chosen.attn_dim, self.branches, chosen.dropout)
        self.instance_classifiers = nn.Linear(width, 2 * chosen.labels)
        self.out_dim = self.branches * width

    @property
    def branches(self) -> int:
        """How many attentions there are."""
        return 1

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return self._attend(bags)[0]

    def supervised(self, bags: RaggedBags, supervision: Supervision) -> Aggregated:
        """``aggregate`` with the weighted instance loss."""
        result, h, attention = self._attend(bags)
        has_label = supervision.targets.to(h.device) > 0.5
        losses = self._instance_losses(h, attention, bags.offsets, has_label)
        if supervision.weights is not None:
            losses = losses * supervision.weights.to(losses)
        labels = self.options.labels if self.options.subtyping else has_label.sum(1).clamp(min=1)
        loss = (losses.sum(1) / labels).mean()
        return result._replace(loss=self.options.instance_weight * loss)

    def _attend(self, bags: RaggedBags) -> tuple[Aggregated, Tensor, Tensor]:
        """The result, h (N, D) and the attention of each branch (N, branches)."""
        h = in_blocks(lambda rows: self.dropout(self.embed(rows)), self.vectors(bags))
        attention = segment_softmax(in_blocks(self.scores, h), bags.offsets)
        embedding = segment_attend(h, bags.offsets, attention).flatten(1)
        return Aggregated(embedding, self._shown(attention)), h, attention

    def _shown(self, attention: Tensor) -> Tensor:
        return attention.squeeze(1)

    def _instance_losses(
        self, h: Tensor, attention: Tensor, offsets: Tensor, has_label: Tensor
    ) -> Tensor:
        """(B, L): the mean over the instances that take part, 0 without any; has_label (B, L)."""
        sizes = offsets.diff().to(h.device)
        bag = owners(offsets).to(h.device)
        taken = (sizes // 2).clamp(max=self.options.instances)
        ranks = segment_ranks(attention, offsets)
        top, bottom = ranks < taken[bag, None], ranks >= (sizes - taken)[bag, None]
        inside = has_label[bag]
        positive, negative = top & inside, bottom & inside
        if self.options.subtyping:
            negative = negative | (top & ~inside)
        likelihood = (
            self.instance_classifiers(h).view(len(h), self.options.labels, 2).log_softmax(2)
        )
        picked = likelihood[:, :, 1].masked_fill(~positive, 0)
        picked = picked + likelihood[:, :, 0].masked_fill(~negative, 0)
        counts = taken[:, None] * (1 + has_label.to(taken.dtype))
        return -segment_sum(picked, offsets) / counts.clamp(min=1)


class ClamMb(ClamSb, declared="clam_mb"):
    """``ClamSb`` with an attention per label: embedding (B, L · D), attention (N, L). Same options.

    A label's part of the embedding is D wide; ``head`` classifies each by itself.
    """

    @property
    def branches(self) -> int:
        return self.options.labels

    def head(self, labels: int) -> nn.Module:
        """A classifier for each label on its own part of the embedding.

        Raises:
            InputError: for another number of labels than there are branches.
        """
        if labels != self.branches:
            raise InputError(
                "aggregator clam_mb, head",
                expected=f"the {self.branches} labels that it has branches for",
                got=str(labels),
                remedy="make it with labels=… for as many",
            )
        return LabelwiseLinear(self.out_dim // labels, labels)

    def _shown(self, attention: Tensor) -> Tensor:
        return attention


class LabelwiseLinear(nn.Module):
    """Logit l is linear in part l of the embedding: (B, L · D) → (B, L).

    Args:
        width: D.
        labels: L.
    """

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(labels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(labels).uniform_(-bound, bound))

    def forward(self, embedding: Tensor) -> Tensor:
        parts = embedding.view(-1, *self.weight.shape)
        return (parts * self.weight).sum(2) + self.bias
