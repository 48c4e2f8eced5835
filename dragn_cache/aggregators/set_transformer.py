"""Set Transformer: instances attend to each other, then one learned seed attends to all of them.

"Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks" (Lee et
al., 2019). The blocks are

- MAB(X, Y) = LN(H + ReLU(W_o H)), H = LN(Q + softmax(Q Kᵀ / √d) V), equations 6 and 7, with
  Q = W_q X + b_q, K = W_k Y, V = W_v Y + b_v; the softmax is by head;
- SAB(X) = MAB(X, X), equation 8; ISAB(X) = MAB(X, MAB(I, X)) with learned I, equations 9 and 10;
- PMA(X) = MAB(S, X) with one learned seed S, equation 11.

Where paper and authors' code differ: the residual is the projected Q and d in the scale is the
whole width and not a head's, as in the code; the layer norms are the paper's, which the code has
off unless asked for; PMA has no feed-forward network of its own in front, as in the code. Here
besides: K has no bias, which a softmax would cancel, and no SAB follows the PMA: on one row it is
no attention. Nothing depends on the order of the instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import SetTransformerOptions
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.padded import (
    Linear,
    Padding,
    attend,
    attention_seconds,
    masked_softmax,
    split,
)


class SetTransformer(Aggregator, declared="set_transformer"):
    """Embedding (B, embed): the seed's row; the attention (N,) is PMA's, averaged over heads.

    Args:
        in_shape: (C, h, w) or (C,); maps are averaged over h and w.
        options: `SetTransformerOptions`.
    """

    options: SetTransformerOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        embed, heads, inducing = self.options.embed, self.options.heads, self.options.inducing
        widths = [self.out_dim] + [embed] * (self.options.layers - 1)
        self.encoder = nn.ModuleList(
            SetBlock(width, embed, heads)
            if inducing is None
            else InducedBlock(width, embed, heads, inducing)
            for width in widths
        )
        self.seed = _learned_rows(1, embed)
        self.pool = AttentionBlock(embed, embed, embed, heads)
        self.out_dim = embed

    def quadratic_seconds(self, n: int) -> float:
        if self.options.inducing is not None:
            return 0.0
        return attention_seconds(n, self.options.layers * self.options.embed)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        x = self.vectors(bags)
        padding = Padding(bags.offsets, x.device)
        for layer in self.encoder:
            x = layer(x, padding)
        seeds = self.seed.expand(len(bags), 1, -1)
        return Aggregated(*self.pool.pooled(seeds, x, padding))


class AttentionBlock(nn.Module):
    """MAB(X, Y) → as X, of width ``embed``; X or Y is one row (N, ·) for each instance."""

    def __init__(self, x_width: int, y_width: int, embed: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, embed**-0.5
        self.q = Linear(x_width, embed)
        self.k = Linear(y_width, embed, bias=False)
        self.v = Linear(y_width, embed)
        self.o = Linear(embed, embed)
        self.norm1, self.norm2 = nn.LayerNorm(embed), nn.LayerNorm(embed)

    def forward(self, x: Tensor, y: Tensor, padding: Padding) -> Tensor:
        """x, y: (N, ·) or (B, m, ·)."""
        q = self.q(x)
        mixed = attend(q, self.k(y), self.v(y), padding, heads=self.heads, scale=self.scale)
        return self._finished(q, mixed)

    def pooled(self, x: Tensor, y: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        """The same for one row of x (B, 1, ·): (B, embed); its weights (N,), mean over heads."""
        q, k, v = self.q(x), self.k(y), self.v(y)
        mixed, weights = [], []
        for group in padding.groups:
            queries = split(q.index_select(0, group.bags), self.heads)
            keys, values = (split(group.padded(rows), self.heads) for rows in (k, v))
            scores = self.scale * queries @ keys.transpose(2, 3)
            mask = None if group.mask is None else group.mask[:, None, None]
            attention = masked_softmax(scores, mask)  # (b, heads, 1, n)
            mixed.append((attention @ values).flatten(1))
            weights.append(attention.mean(1).squeeze(1))
        return self._finished(q[:, 0], padding.dense(mixed)), padding.ragged(weights)

    def _finished(self, q: Tensor, mixed: Tensor) -> Tensor:
        h = self.norm1(q + mixed)
        result: Tensor = self.norm2(h + F.relu(self.o(h)))
        return result


class SetBlock(nn.Module):
    """SAB: (N, width) → (N, embed)."""

    def __init__(self, width: int, embed: int, heads: int) -> None:
        super().__init__()
        self.block = AttentionBlock(width, width, embed, heads)

    def forward(self, x: Tensor, padding: Padding) -> Tensor:
        result: Tensor = self.block(x, x, padding)
        return result


class InducedBlock(nn.Module):
    """ISAB: (N, width) → (N, embed) by way of ``inducing`` learned rows."""

    def __init__(self, width: int, embed: int, heads: int, inducing: int) -> None:
        super().__init__()
        self.inducing = _learned_rows(inducing, embed)
        self.gather = AttentionBlock(embed, width, embed, heads)
        self.spread = AttentionBlock(width, embed, embed, heads)

    def forward(self, x: Tensor, padding: Padding) -> Tensor:
        gathered = self.gather(self.inducing.expand(padding.bags, -1, -1), x, padding)
        result: Tensor = self.spread(x, gathered, padding)
        return result


def _learned_rows(count: int, width: int) -> nn.Parameter:
    """(count, width), from the start that the authors give inducing points and seeds."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, count, width))[0])
