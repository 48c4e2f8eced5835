"""ACMIL: several attentions made to differ, the highest of their weights withheld at random.

"Attention-Challenging Multiple Instance Learning for Whole Slide Image Classification" (Zhang et
al., 2024), with gated attention. With h = ReLU(W x + b) and K branches:

- scores s_i = w_iᵀ (tanh(V h) ⊙ σ(U h)) for branch i, all on one V and U;
- in training, of the 10 highest scores of a bag and branch (all, in smaller bags), 0.6 of them, by
  chance and rounded down, become -∞ (stochastic top-k instance masking);
- a_i = softmax over the bag of s_i; a linear classifier of its own on Σ_k a_ik h_k has the bag's
  labels as targets;
- the bag's embedding is Σ_k ā_k h_k, with ā the mean of the branches' a;
- loss = bag loss + mean loss of the branches + diversity: the mean over the pairs of branches of
  the cosine similarity of their a within the bag, mean over the bags.

What differs. W has a bias, attention scores have none, which the softmax would cancel. With one
branch there is no diversity, but its classifier stays; the authors then leave it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import AcmilOptions
from dragn_cache.aggregators.layers import GatedScores, in_blocks, relu_network
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import owners
from dragn_cache.ragged.segments import segment_attend, segment_ranks, segment_softmax, segment_sum


class Acmil(Aggregator, declared="acmil"):
    """Embedding (B, D): each bag's mean weighted by the mean attention, which is (N,).

    Args:
        in_shape: (C, h, w) or (C,); maps are averaged over h and w first.
        options: `AcmilOptions`.
    """

    options: AcmilOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        branches = self.options.branches
        self.embed, self.out_dim = relu_network(self.out_dim, self.options.embed)
        self.scores = GatedScores(self.out_dim, self.options.attn_dim, branches)
        self.classifiers = nn.ModuleList(
            nn.Linear(self.out_dim, self.options.labels) for _ in range(branches)
        )

    def label_biases(self) -> Sequence[Tensor]:
        return [cast(nn.Linear, layer).bias for layer in self.classifiers]

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return self._attend(bags)[0]

    def supervised(self, bags: RaggedBags, supervision: Supervision) -> Aggregated:
        """``aggregate`` with the branches' loss and the diversity term."""
        result, h, attention = self._attend(bags)
        pooled = segment_attend(h, bags.offsets, attention)  # (B, K, D)
        logits = [layer(pooled[:, i]) for i, layer in enumerate(self.classifiers)]
        bag = torch.arange(len(bags)).repeat(len(logits))
        loss = supervision.loss(torch.cat(logits), bag) + similarity(attention, bags.offsets)
        return result._replace(loss=loss)

    def _attend(self, bags: RaggedBags) -> tuple[Aggregated, Tensor, Tensor]:
        """The result, h (N, D) and the attention of each branch (N, K)."""
        h = in_blocks(self.embed, self.vectors(bags))
        scores = in_blocks(self.scores, h)
        if self.training:
            chosen = masked_rows(scores, bags.offsets, self.options.top, self.options.mask)
            scores = scores.masked_fill(chosen, float("-inf"))
        attention = segment_softmax(scores, bags.offsets)
        mean = attention.mean(1)
        return Aggregated(segment_sum(h, bags.offsets, mean), mean), h, attention


def masked_rows(scores: Tensor, offsets: Tensor, top: int, rate: float) -> Tensor:
    """(N, K) → (N, K) bool: ``rate`` of each bag's ``top`` highest, by column, drawn at random.

    The number is rounded down, and below that of the highest, so that something is left of every
    bag. Drawn from the global generator of the CPU, the same on every device.
    """
    sizes = offsets.diff().to(scores.device)
    bag = owners(offsets).to(scores.device)
    highest = sizes.clamp(max=top)
    count = (highest.double() * rate).long().minimum(highest - 1)
    outside = segment_ranks(scores, offsets) >= highest[bag, None]
    drawn = torch.rand(scores.shape).to(scores.device).masked_fill(outside, -1.0)
    return segment_ranks(drawn, offsets) < count[bag, None]


def similarity(attention: Tensor, offsets: Tensor) -> Tensor:
    """Scalar: the mean cosine similarity of the columns (N, K) within each bag, mean over bags.

    0 where there is one column only.
    """
    branches = attention.shape[1]
    first, second = torch.triu_indices(branches, branches, 1, device=attention.device)
    if len(first) == 0:
        return attention.new_zeros(())
    lengths = segment_sum(attention.square(), offsets).sqrt()
    products = segment_sum(attention[:, first] * attention[:, second], offsets)
    return (products / (lengths[:, first] * lengths[:, second])).mean()
