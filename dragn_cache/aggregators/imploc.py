"""ImPLoc: a transformer encoder without positions over a bag's instances, then a mean.

"ImPLoc: a multi-instance deep learning model for the prediction of protein subcellular
localization based on immunohistochemistry images" (Long, Yang, Shen, 2020): 4 layers of 6 heads
with d_k = 32 and a feed-forward network of width 4d, each with its residual and layer norm after:

    h = LN(x + W_o softmax(Q Kᵀ / √d_k) V),  x' = LN(h + W_2 ReLU(W_1 h + b_1) + b_2)

The authors' code reads the output at the last position, which may be padding: a result then
depends on the bag's batch mates and on the order of its instances. Here it is the mean over the
instances, or a learned CLS row in front, and neither depends on either. The width d, the CNN's own
there, is ``embed``, behind a linear layer. Q, K and V have no biases, and no dropout is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import ImplocOptions
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.padded import Linear, Padding, attend, attention_seconds, firsts, with_first
from dragn_cache.ragged.segments import segment_mean


class Imploc(Aggregator, declared="imploc"):
    """Embedding (B, embed): the mean of the encoder's rows, or its CLS row; no attention.

    Args:
        in_shape: (C, h, w) or (C,); maps are averaged over h and w.
        options: `ImplocOptions`.
    """

    options: ImplocOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        embed, heads, head_dim = self.options.embed, self.options.heads, self.options.head_dim
        self.embed = Linear(self.out_dim, embed)
        with_cls = self.options.readout == "cls"
        self.cls = nn.Parameter(torch.randn(embed)) if with_cls else None
        layers = self.options.layers
        self.layers = nn.ModuleList(EncoderLayer(embed, heads, head_dim) for _ in range(layers))
        self.out_dim = embed

    def row_values(self, *, training: bool) -> float:
        """The widths of all layers, or of one at a time."""
        widths = super().row_values(training=training)
        return widths if training else widths / len(self.layers)

    def quadratic_seconds(self, n: int) -> float:
        heads = self.options.heads * self.options.head_dim
        return attention_seconds(n, len(self.layers) * heads)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        x, offsets = self.embed(self.vectors(bags)), bags.offsets
        if self.cls is not None:
            x, offsets = with_first(self.cls, x, offsets)
        padding = Padding(offsets, x.device)
        for layer in self.layers:
            x = layer(x, padding)
        read = segment_mean(x, offsets) if self.cls is None else firsts(x, offsets)
        return Aggregated(read, None)


class EncoderLayer(nn.Module):
    """(N, embed) → (N, embed)."""

    def __init__(self, embed: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(embed, 3 * heads * head_dim, bias=False)
        self.o = Linear(heads * head_dim, embed, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(embed), nn.LayerNorm(embed)
        self.widen, self.narrow = Linear(embed, 4 * embed), Linear(4 * embed, embed)

    def forward(self, x: Tensor, padding: Padding) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, 1)
        h = self.norm1(x + self.o(attend(q, k, v, padding, heads=self.heads)))
        result: Tensor = self.norm2(h + self.narrow(F.relu(self.widen(h))))
        return result
