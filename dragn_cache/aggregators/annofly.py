"""AnnoFly: a recurrent network over a bag's instances, and attention over its states.

After "AnnoFly: annotating Drosophila embryonic images based on an attention-enhanced RNN model"
(Yang et al., 2019). Only its abstract was read, which says no more than the title about the
network, so this is a reading: h_1 … h_n are the states of a GRU or LSTM over the instances,
e_i = vᵀ tanh(W h_i + b) (additive attention), a = softmax(e) over the bag, and the embedding is
Σ a_i h_i. All widths are this project's choice, and so are both directions as the default: each
state, and with it each weight, then knows the whole bag.

Maps are averaged over h and w first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.old_options import check_choice, check_count
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.packed import run_over_bags
from dragn_cache.ragged.segments import segment_softmax, segment_sum


class AnnoFly(Aggregator):
    """Embedding (B, 2 H), or (B, H) in one direction; attention (N,). Order matters.

    Args:
        in_shape: (C, h, w) or (C,).
        cell: "gru" or "lstm".
        hidden: H, the units of a direction.
        bidirectional: forward and backward states side by side; False is forward only.
        attn_dim: width of W h, on which the attention is computed.
    """

    needs: ClassVar[Literal["map", "vector", "any"]] = "any"
    order_sensitive: bool = True
    has_attention: ClassVar[bool] = True

    def __init__(
        self,
        in_shape: Sequence[int],
        *,
        cell: Literal["gru", "lstm"] = "gru",
        hidden: int = 256,
        bidirectional: bool = True,
        attn_dim: int = 128,
    ) -> None:
        super().__init__(in_shape)
        check_choice("annofly", "cell", cell, ("gru", "lstm"))
        check_count("annofly", "hidden", hidden)
        check_choice("annofly", "bidirectional", bidirectional, (True, False))
        check_count("annofly", "attn_dim", attn_dim)
        kind = nn.GRU if cell == "gru" else nn.LSTM
        self.rnn = kind(self.out_dim, hidden, bidirectional=bidirectional)
        self.out_dim = 2 * hidden if bidirectional else hidden
        self.W = nn.Linear(self.out_dim, attn_dim)
        self.v = nn.Linear(attn_dim, 1, bias=False)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        h = run_over_bags(self.rnn, self.vectors(bags), bags.offsets)
        scores = self.v(self.W(h).tanh()).squeeze(1)
        attention = segment_softmax(scores, bags.offsets)
        return Aggregated(segment_sum(h, bags.offsets, attention), attention)
