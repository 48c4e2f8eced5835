"""NAN: attention with a learned query, then again with a query made of the first result.

"Neural Aggregation Network for Video Face Recognition" (Yang et al., 2017): a block scores each
instance by a query, e_k = qᵀ f_k, and gives r = Σ a_k f_k with a = softmax(e) over the bag. The
first block's query q0 is a parameter; the second's is q1 = tanh(W r0 + b), of the bag itself.

- q0 starts at 0, so the first block starts as the mean.
- W starts from N(0, 1/C): with variance 1, tanh would be saturated from the start on features
  whose entries are of the order of 1.
- The paper's features have length 1. Here they are a frozen CNN's, whose length tells as well, so
  ``unit_length`` is off by default; with it and the W above, attention starts almost even.

Maps are averaged over h and w first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import NanOptions
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_softmax, segment_sum


class Nan(Aggregator, declared="nan"):
    """Embedding (B, C): each bag's attention-weighted mean; the attention (N,) is the last block's.

    Args:
        in_shape: (C, h, w) or (C,).
        options: `NanOptions`.
    """

    options: NanOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        self.q0 = nn.Parameter(torch.zeros(self.out_dim))
        self.W = nn.Linear(self.out_dim, self.out_dim) if self.options.blocks == 2 else None
        if self.W is not None:
            nn.init.normal_(self.W.weight, std=self.out_dim**-0.5)
            nn.init.zeros_(self.W.bias)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        f = self.vectors(bags)
        if self.options.unit_length:
            f = F.normalize(f)
        result, attention = _attend(f, f @ self.q0, bags)
        if self.W is not None:
            q1 = self.W(result).tanh()
            own = q1.index_select(0, bags.segment_ids)
            result, attention = _attend(f, (f * own).sum(1), bags)
        return Aggregated(result, attention)


def _attend(f: Tensor, scores: Tensor, bags: RaggedBags) -> tuple[Tensor, Tensor]:
    """(N, C) and (N,) → (B, C) and the weights (N,)."""
    attention = segment_softmax(scores, bags.offsets)
    return segment_sum(f, bags.offsets, attention), attention
