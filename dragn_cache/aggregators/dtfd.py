"""DTFD-MIL: a bag is split into pseudo-bags, each gives one or two features, attention joins them.

"DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning for Histopathology Whole
Slide Image Classification" (Zhang et al., 2022). With h = ReLU(W x + b):

- a bag of n instances becomes min(G, n) pseudo-bags of nearly equal size: at random in training,
  of neighbours at evaluation;
- tier 1, with weights shared by all pseudo-bags: gated attention a, pooled Σ a_k h_k, a linear
  classifier with the bag's labels as targets;
- distilling: ``afs`` takes each pseudo-bag's pooled feature; ``max`` its instance h_k with the
  highest class activation, w · (a_k h_k), the instance's part in the tier-1 logit; ``maxmin`` that
  and the one with the lowest;
- tier 2: gated attention b over a bag's distilled features; their weighted sum is the embedding;
- loss = loss of tier 1 + loss of tier 2.

In each form the embedding is a weighted sum of the h_k: the attention given is this weight, a_k
b_g for ``afs``, and b_g for the instances that were picked and 0 for all others otherwise.

What differs. The class activation of an instance is its largest over the labels: the paper has
one positive class, and ranks by its probability, which is the same order for one label. Each
step's gradient is that of the sum of the losses, so tier 2's loss trains tier 1 too; the authors
step two optimisers one after the other, tier 2's loss never reaching tier 1, and clip the gradients
of both; nothing is clipped here. They split at random at evaluation as well; by index a
result can be repeated, and depends on the instances' order. W has a bias, attention scores have
none, which the softmax would cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import DtfdOptions
from dragn_cache.aggregators.layers import GatedScores, in_blocks, relu_network
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of, owners
from dragn_cache.ragged.segments import segment_argmax, segment_ranks, segment_softmax, segment_sum


class Dtfd(Aggregator, declared="dtfd"):
    """Embedding (B, D): a weighted sum of a bag's h_k; the attention (N,) is the weights.

    Args:
        in_shape: (C, h, w) or (C,); maps are averaged over h and w first.
        options: `DtfdOptions`.
    """

    options: DtfdOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        # With one pseudo-bag the order of the instances does not matter.
        self.order_sensitive = self.options.groups > 1
        self.embed, self.out_dim = relu_network(self.out_dim, self.options.embed)
        self.tier1 = GatedScores(self.out_dim, self.options.attn_dim)
        self.tier2 = GatedScores(self.out_dim, self.options.attn_dim)
        self.classifier = nn.Linear(self.out_dim, self.options.labels)

    def label_biases(self) -> Sequence[Tensor]:
        return (self.classifier.bias,)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return self._tiers(bags)[0]

    def supervised(self, bags: RaggedBags, supervision: Supervision) -> Aggregated:
        """``aggregate`` with the loss of the pseudo-bags, each with its bag's targets."""
        result, pooled, groups = self._tiers(bags)
        loss = supervision.loss(self.classifier(pooled), owners(groups))
        return result._replace(loss=loss)

    def _tiers(self, bags: RaggedBags) -> tuple[Aggregated, Tensor, Tensor]:
        """The result; the pooled pseudo-bags (P, D); their offsets by bag (B + 1,)."""
        parts, groups = pseudo_bags(bags.offsets, self.options.groups)
        h = in_blocks(self.embed, self.vectors(bags))
        if not self.training:
            embedding, attention, pooled = self._distilled(h, parts, groups)
            return Aggregated(embedding, attention), pooled, groups
        ranks = segment_ranks(torch.rand(len(h)), bags.offsets)
        order = (bags.offsets[owners(bags.offsets)] + ranks).to(h.device)
        embedding, shuffled, pooled = self._distilled(h[order], parts, groups)
        attention = torch.empty_like(shuffled).index_copy(0, order, shuffled)
        return Aggregated(embedding, attention), pooled, groups

    def _distilled(self, h: Tensor, parts: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding (B, D), weights (N,) and pooled pseudo-bags (P, D) of h in pseudo-bags."""
        first = segment_softmax(in_blocks(self.tier1, h).squeeze(1), parts)
        pooled = segment_sum(h, parts, first)
        if self.options.distill == "afs":
            second = segment_softmax(self.tier2(pooled).squeeze(1), groups)
            weights = first * second[owners(parts).to(h.device)]
            return segment_sum(pooled, groups, second), weights, pooled
        activation = ((h * first[:, None]) @ self.classifier.weight.t()).amax(1, keepdim=True)
        rows = segment_argmax(activation, parts)
        if self.options.distill == "maxmin":
            rows = torch.cat((rows, segment_argmax(-activation, parts)), 1)
        picked, ends = h[rows.flatten()], groups * rows.shape[1]
        second = segment_softmax(self.tier2(picked).squeeze(1), ends)
        # An instance alone in its pseudo-bag is both its highest and its lowest.
        weights = torch.zeros_like(first).index_add(0, rows.flatten(), second)
        return segment_sum(picked, ends, second), weights, pooled


def pseudo_bags(offsets: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Split each bag of n rows into min(groups, n) parts of neighbours, the larger ones first.

    Returns:
        offsets (P + 1,) of the parts among the rows, and offsets (B + 1,) of the bags among the
        parts; int64, on the host.
    """
    sizes = offsets.diff()
    counts = sizes.clamp(max=groups)
    by_bag = offsets_of(counts)
    bag = owners(by_bag)
    number = torch.arange(len(bag)) - by_bag[bag]
    extra = number < (sizes % counts)[bag]
    return offsets_of((sizes // counts)[bag] + extra), by_bag
