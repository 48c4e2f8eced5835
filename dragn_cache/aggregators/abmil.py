"""ABMIL: a weighted mean of a bag's instances, by attention, with or without a gate.

"Attention-based Deep Multiple Instance Learning" (Ilse, Tomczak, Welling, 2018), both forms in one
file because the paper has both and they share all but the score:

- ``abmil``: a = softmax over the bag of wᵀ tanh(V h)
- ``gated_abmil``: a = softmax over the bag of wᵀ (tanh(V h) ⊙ σ(U h))

and the embedding is Σ a_k h_k. V and U have biases, as in the authors' code; w has none, which a
softmax would cancel. Maps are averaged over h and w first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import AbmilOptions
from dragn_cache.aggregators.layers import in_blocks, relu_network
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_softmax, segment_sum


class Abmil(Aggregator, declared="abmil"):
    """Embedding (B, D): each bag's attention-weighted mean; the attention is (N,).

    Args:
        in_shape: (C, h, w) or (C,).
        options: `AbmilOptions`.
    """

    options: AbmilOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        self.embed, self.out_dim = relu_network(self.out_dim, self.options.embed)
        self.V = nn.Linear(self.out_dim, self.options.attn_dim)
        self.w = nn.Linear(self.options.attn_dim, 1, bias=False)

    def hidden(self, h: Tensor) -> Tensor:
        """(N, D) → (N, attn_dim): what w makes a score of."""
        hidden: Tensor = self.V(h).tanh()
        return hidden

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        h = in_blocks(self.embed, self.vectors(bags))
        scores = in_blocks(lambda rows: self.w(self.hidden(rows)), h).squeeze(1)
        attention = segment_softmax(scores, bags.offsets)
        return Aggregated(segment_sum(h, bags.offsets, attention), attention)


class GatedAbmil(Abmil, declared="gated_abmil"):
    """``Abmil`` with a gate: tanh(V h) ⊙ σ(U h). Same options."""

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        self.U = nn.Linear(self.out_dim, self.options.attn_dim)

    def hidden(self, h: Tensor) -> Tensor:
        """(N, D) → (N, attn_dim): what w makes a score of."""
        gate: Tensor = self.U(h).sigmoid()
        return super().hidden(h) * gate
