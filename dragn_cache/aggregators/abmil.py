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
from typing import ClassVar, Literal

from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.layers import relu_network
from dragn_cache.old_options import check_count
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_softmax, segment_sum


class Abmil(Aggregator):
    """Embedding (B, D): each bag's attention-weighted mean; the attention is (N,).

    Args:
        in_shape: (C, h, w) or (C,).
        attn_dim: width of V h, on which the attention is computed.
        embed: widths of a ReLU network h = f(x) in front, one or several; the last is D. Empty, the
            default, h is the feature itself and D = C: a frozen CNN's vector is an embedding
            already. The paper's network for feature vectors is 256, 128, 64 with ``attn_dim`` 64.
    """

    needs: ClassVar[Literal["map", "vector", "any"]] = "any"
    order_sensitive: bool = False
    has_attention: ClassVar[bool] = True

    def __init__(
        self, in_shape: Sequence[int], *, attn_dim: int = 128, embed: int | Sequence[int] = ()
    ) -> None:
        super().__init__(in_shape)
        check_count("abmil", "attn_dim", attn_dim)
        self.embed, self.out_dim = relu_network("abmil", "embed", self.out_dim, embed)
        self.V = nn.Linear(self.out_dim, attn_dim)
        self.w = nn.Linear(attn_dim, 1, bias=False)

    def hidden(self, h: Tensor) -> Tensor:
        """(N, D) → (N, attn_dim): what w makes a score of."""
        hidden: Tensor = self.V(h).tanh()
        return hidden

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        h = self.embed(self.vectors(bags))
        scores = self.w(self.hidden(h)).squeeze(1)
        attention = segment_softmax(scores, bags.offsets)
        return Aggregated(segment_sum(h, bags.offsets, attention), attention)


class GatedAbmil(Abmil):
    """``Abmil`` with a gate: tanh(V h) ⊙ σ(U h). Same options."""

    def __init__(
        self, in_shape: Sequence[int], *, attn_dim: int = 128, embed: int | Sequence[int] = ()
    ) -> None:
        super().__init__(in_shape, attn_dim=attn_dim, embed=embed)
        self.U = nn.Linear(self.out_dim, attn_dim)

    def hidden(self, h: Tensor) -> Tensor:
        """(N, D) → (N, attn_dim): what w makes a score of."""
        gate: Tensor = self.U(h).sigmoid()
        return super().hidden(h) * gate
