"""DSMIL: per label, instances are weighted by how much they resemble the bag's critical one.

"Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification with
Self-supervised Contrastive Learning" (Li, Li, Eliceiri, 2021). For label l and instances k:

- first stream: c_k = W h_k + b, the instances' own logits; m_l = argmax over the bag of c_kl, the
  critical instance (of those that tie the first);
- second stream: U_kl = softmax over the bag of q_k · q_{m_l} / √128, and the bag's embedding for l
  is Σ_k U_kl v_k;
- the L embeddings side by side, times L · D weights per label, are the second stream's logits (the
  authors write a Conv1d from L to L channels whose kernel has length D, which is the same);
- loss = ½ loss(max over the bag of c) + ½ loss(second stream).

What differs. q and v are linear, as in the paper and the authors' first code. Their later code has
two layers with ReLU and tanh for q, and h itself for v or, by a switch, linear with ReLU: options.
The division by √128 is the code's. The model's prediction is the second stream's; the paper, and
the later code by default, average both streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import DsmilOptions
from dragn_cache.aggregators.layers import in_blocks
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_argmax, segment_attend, segment_softmax


class Dsmil(Aggregator, declared="dsmil"):
    """Embedding (B, L · C), label after label; attention (N, L), a label's adds up to 1 in a bag.

    Args:
        in_shape: (C, h, w) or (C,); maps are averaged over h and w first.
        options: `DsmilOptions`.
    """

    bag_weight: float = 0.5

    options: DsmilOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        labels, attn_dim, width = self.options.labels, self.options.attn_dim, self.out_dim
        self.instances = nn.Linear(width, labels)
        self.query = nn.Sequential(nn.Linear(width, attn_dim))
        if self.options.query == "mlp":
            self.query.extend((nn.ReLU(), nn.Linear(attn_dim, attn_dim), nn.Tanh()))
        self.value = nn.Sequential()
        if self.options.value != "identity":
            self.value.append(nn.Linear(width, width))
        if self.options.value == "relu":
            self.value.append(nn.ReLU())
        self.out_dim = labels * width

    def label_biases(self) -> Sequence[Tensor]:
        return (self.instances.bias,)

    def row_values(self, *, training: bool) -> float:
        """The layers' widths, and the products of queries, in training of each label."""
        products = self.options.labels if training else 3
        return products * self.options.attn_dim + super().row_values(training=training)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return self._streams(bags)[0]

    def supervised(self, bags: RaggedBags, supervision: Supervision) -> Aggregated:
        """``aggregate`` with half the loss of the first stream: the largest logit of each bag."""
        result, largest = self._streams(bags)
        return result._replace(loss=0.5 * supervision.loss(largest))

    def _streams(self, bags: RaggedBags) -> tuple[Aggregated, Tensor]:
        """The result of the second stream, and the logits (B, L) of the first."""
        h = self.vectors(bags)
        logits = self.instances(h)
        critical = segment_argmax(logits, bags.offsets)
        q, bag = in_blocks(self.query, h), bags.segment_ids
        # One label at a time: all at once would take N · L · attn_dim numbers.
        scores = [(q * q[rows].index_select(0, bag)).sum(1) for rows in critical.t()]
        scaled = torch.stack(scores, 1) / q.shape[1] ** 0.5
        attention = segment_softmax(scaled, bags.offsets)
        embedding = segment_attend(self.value(h), bags.offsets, attention).flatten(1)
        return Aggregated(embedding, attention), logits.gather(0, critical)
