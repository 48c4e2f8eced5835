"""RRT-MIL: instances are embedded anew by attention in and across regions, then pooled.

"Feature Re-Embedding: Towards Foundation Model-Level Performance in Computational Pathology" (Tang
et al., 2024), with regional attention (R-MSA), cross-region attention (CR-MSA) and EPEG:

1. x = ReLU(W f + b). The instances fill a square row by row, and r × r equal squares of it are the
   regions.
2. x ← x + R(LN(x)): self-attention inside each region, whose scores E are added to by EPEG, a
   depthwise convolution of ``kernel`` queries over E, one kernel for each head.
3. x ← x + C(LN(x)): each region is summed up as K weighted means of its rows, with weights the
   softmax over its rows of x Φ, Φ (embed, K); the k-th means of all regions of a bag attend to
   each other; and a row takes back the sum over k of its region's, times the softmax over k of
   x Φ, times x Φ scaled to 0..1 in the region.
4. Gated attention (abmil.py) pools the rows of LN(x).

Where it differs from the authors' code: r there is always 8, and the square is filled up with zero
rows that take part in every softmax; here a square has no places without an instance, empty regions
are left out, and small bags have fewer regions: r grows with the square's side, about 4 × 4
instances to a region, so that it is 1 up to 4 instances and 2 up to 64. Their pooling has no gate.
The scaling to 0..1 divides by at least ``LEAST_RANGE``: by less, equal rows would be told apart by
rounding alone. Q, K, V and EPEG have no biases, which a softmax would cancel (but for V's, which
the bias after it makes up for). No dropout is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragn_cache.aggregators.abmil import GatedAbmil
from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import RrtOptions
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.ragged.padded import (
    Linear,
    Padding,
    attend,
    attention_seconds,
    masked_softmax,
    split,
)

LEAST_RANGE = 1e-3


class Rrt(Aggregator, declared="rrt"):
    """Embedding (B, embed): a weighted mean of re-embedded rows; the attention (N,) is its weights.

    Args:
        in_shape: (C, h, w) or (C,); maps are averaged over h and w.
        options: `RrtOptions`.
    """

    options: RrtOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        embed, heads = self.options.embed, self.options.heads
        self.embed = Linear(self.out_dim, embed)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embed) for _ in range(3))
        self.inside = RegionAttention(embed, heads, self.options.kernel)
        self.across = CrossRegionAttention(embed, heads, self.options.means)
        self.pool = GatedAbmil((embed,), attn_dim=self.options.attn_dim)
        self.out_dim = embed

    def bag_values(self, n: int, *, training: bool) -> float:
        """Those of the rows, and of the scores of each two rows of a region."""
        scores = self.options.heads * (n / self.options.regions) ** 2
        return super().bag_values(n, training=training) + (7 if training else 4) * scores

    def quadratic_seconds(self, n: int) -> float:
        return attention_seconds(n, self.options.embed) / self.options.regions**2

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        regions = partition(bags.offsets, self.options.regions)
        x = F.relu(self.embed(self.vectors(bags)))
        x = x.index_select(0, regions.rows.to(x.device))
        padding = Padding(regions.offsets, x.device)
        x = x + self.inside(self.norm1(x), padding)
        x = x + self.across(self.norm2(x), padding, regions.counts)
        # The regions of a bag stand together: its rows are still its rows, in another order.
        embedding, attention, _ = self.pool.aggregate(RaggedBags(self.norm3(x), bags.offsets))
        back = regions.rows.argsort().to(x.device)
        return Aggregated(embedding, None if attention is None else attention[back])


class Regions(NamedTuple):
    """The rows of B bags by region.

    Attributes:
        rows: (N,) int64, the rows region by region, bag by bag.
        offsets: (R + 1,) int64, where the regions begin.
        counts: (B,) int64, regions of each bag.
    """

    rows: Tensor
    offsets: Tensor
    counts: Tensor


def partition(offsets: Tensor, most: int) -> Regions:
    """Regions of bags (B + 1,), at most ``most`` along a side; empty ones are left out."""
    sizes = np.diff(offsets.numpy())
    bag = np.repeat(np.arange(len(sizes)), sizes)
    sides = np.ceil(np.sqrt(sizes)).astype(np.int64)
    per_side = np.minimum(most, np.maximum(-(-sides // 4), np.where(sides > 2, 2, 1)))
    width = -(-sides // per_side)  # of a region
    row, column = np.divmod(np.arange(len(bag)) - offsets.numpy()[bag], (per_side * width)[bag])
    region = row // width[bag] * per_side[bag] + column // width[bag]
    key = bag * most**2 + region
    order = np.argsort(key, kind="stable")
    regions, counts = np.unique(key, return_counts=True)
    return Regions(
        torch.from_numpy(order),
        offsets_of(torch.from_numpy(counts)),
        torch.from_numpy(np.bincount(regions // most**2, minlength=len(sizes))),
    )


class RegionAttention(nn.Module):
    """R: (N, embed) → (N, embed), each row of its region."""

    def __init__(self, embed: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (embed // heads) ** -0.5
        self.qkv = Linear(embed, 3 * embed, bias=False)
        self.epeg = nn.Conv2d(
            heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False
        )
        self.o = Linear(embed, embed)

    def forward(self, x: Tensor, padding: Padding) -> Tensor:
        qkv, results = self.qkv(x), []
        for group in padding.groups:
            # Scores of queries that are none would enter EPEG: zeros, as beyond the region.
            q, k, v = (
                split(part, self.heads) for part in group.zeroed(group.padded(qkv)).chunk(3, 2)
            )
            scores = self.scale * q @ k.transpose(2, 3)
            mask = None if group.mask is None else group.mask[:, None, None]
            mixed = masked_softmax(scores + self.epeg(scores), mask) @ v
            results.append(mixed.transpose(1, 2).flatten(2))
        result: Tensor = self.o(padding.ragged(results))
        return result


class CrossRegionAttention(nn.Module):
    """C: (N, embed) → (N, embed), by way of ``means`` rows for each region."""

    def __init__(self, embed: int, heads: int, means: int) -> None:
        super().__init__()
        self.heads = heads
        self.phi = Linear(embed, means, bias=False)
        self.qkv = Linear(embed, 3 * embed, bias=False)
        self.o = Linear(embed, embed)

    def forward(self, x: Tensor, padding: Padding, counts: Tensor) -> Tensor:
        """``counts`` (B,) int64, on the host: the regions of each bag."""
        scores, gathered = self.phi(x), []
        for group in padding.groups:
            by_mean = group.padded(scores).transpose(1, 2)
            mask = None if group.mask is None else group.mask[:, None]
            gathered.append(masked_softmax(by_mean, mask) @ group.padded(x))
        means = self._mixed(padding.dense(gathered), counts)
        results = []
        for group in padding.groups:
            spread = _scaled(group.padded(scores), group.mask) * group.padded(scores).softmax(2)
            results.append(spread @ means.index_select(0, group.bags))
        return padding.ragged(results)

    def _mixed(self, means: Tensor, counts: Tensor) -> Tensor:
        """(R, K, embed) → the same: the k-th means of a bag's regions attend to each other."""
        regions, kinds = means.shape[:2]
        rows = means.transpose(0, 1).flatten(0, 1)
        padding = Padding(offsets_of(counts.repeat(kinds)), means.device)
        q, k, v = self.qkv(rows).chunk(3, 1)
        mixed: Tensor = self.o(attend(q, k, v, padding, heads=self.heads))
        return mixed.view(kinds, regions, -1).transpose(0, 1)


def _scaled(scores: Tensor, mask: Tensor | None) -> Tensor:
    """(b, n, K) from the least to the largest of the n rows to 0..1; masked places have any."""
    low = high = scores
    if mask is not None:
        low = scores.masked_fill(~mask[..., None], float("inf"))
        high = scores.masked_fill(~mask[..., None], float("-inf"))
    least = low.amin(1, keepdim=True)
    return (scores - least) / (high.amax(1, keepdim=True) - least).clamp(min=LEAST_RANGE)
