"""Layers that several methods share: a ReLU network in front, and gated attention scores.

The gate is that of "Attention-based Deep Multiple Instance Learning" (Ilse et al., 2018), for one
score per instance or several. The last layer has no bias, which a softmax over a bag would cancel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dragn_cache.aggregators.declared import BLOCK_ROWS


def relu_network(width: int, widths: int | tuple[int, ...]) -> tuple[nn.Sequential, int]:
    """Linear layers from ``width`` to each of ``widths``, a ReLU after each; and the last width.

    Args:
        widths: one or several; empty makes the identity.
    """
    chosen = widths if isinstance(widths, tuple) else (widths,)
    pairs = itertools.pairwise((width, *chosen))
    layers = (m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU()))
    return nn.Sequential(*layers), (width, *chosen)[-1]


def in_blocks(layers: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``layers(rows)`` of layers that treat each row (N, …) by itself.

    More than `BLOCK_ROWS` rows are taken some at a time, and with gradients a second time in the
    backward pass, so that only their results stay in memory. Dropout draws the same again.
    """
    if len(rows) <= BLOCK_ROWS:
        return layers(rows)
    again = torch.is_grad_enabled()
    blocks = torch.split(rows, BLOCK_ROWS)
    return torch.cat(
        [checkpoint(layers, b, use_reentrant=False) if again else layers(b) for b in blocks]
    )


class GatedScores(nn.Module):
    """wᵀ (tanh(V h) ⊙ σ(U h)) of h (N, D): scores (N, K), before the softmax.

    Args:
        width: D.
        attn_dim: width of V h and of U h.
        scores: K.
        dropout: of tanh(V h) and of σ(U h).
    """

    def __init__(self, width: int, attn_dim: int, scores: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.V = nn.Linear(width, attn_dim)
        self.U = nn.Linear(width, attn_dim)
        self.w = nn.Linear(attn_dim, scores, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        hidden = self.dropout(self.V(h).tanh()) * self.dropout(self.U(h).sigmoid())
        scores: Tensor = self.w(hidden)
        return scores
