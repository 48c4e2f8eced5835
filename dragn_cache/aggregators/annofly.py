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
from typing import Any

from torch import nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import AnnoFlyOptions
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.packed import run_over_bags
from dragn_cache.ragged.segments import segment_softmax, segment_sum


class AnnoFly(Aggregator, declared="annofly"):
    """Embedding (B, 2 H), or (B, H) in one direction; attention (N,). Order matters.

    Args:
        in_shape: (C, h, w) or (C,).
        options: `AnnoFlyOptions`.
    """

    options: AnnoFlyOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        hidden, both = self.options.hidden, self.options.bidirectional
        kind = nn.GRU if self.options.cell == "gru" else nn.LSTM
        self.rnn = kind(self.out_dim, hidden, bidirectional=both)
        self.out_dim = 2 * hidden if both else hidden
        self.W = nn.Linear(self.out_dim, self.options.attn_dim)
        self.v = nn.Linear(self.options.attn_dim, 1, bias=False)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        h = run_over_bags(self.rnn, self.vectors(bags), bags.offsets)
        scores = self.v(self.W(h).tanh()).squeeze(1)
        attention = segment_softmax(scores, bags.offsets)
        return Aggregated(segment_sum(h, bags.offsets, attention), attention)
