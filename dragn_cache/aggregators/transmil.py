"""TransMIL: two layers of attention with a class token, positions from a square of instances.

"TransMIL: Transformer based Correlated Multiple Instance Learning for Whole Slide Image
Classification" (Shao et al., 2021), algorithm 2:

1. x = ReLU(W f + b). Let s = ⌈√n⌉; the first s² - n instances are repeated at the end, and the
   s² rows fill a square row by row. A learned class token comes in front.
2. x ← x + A(LN(x)), PPEG, x ← x + A(LN(x)), and the embedding is the class token's row of LN(x).
3. A is self-attention without biases in Q, K and V, plus a depthwise convolution of 33 rows over
   V, one kernel for each head, then a linear layer.
4. PPEG adds depthwise convolutions of 7 × 7, 5 × 5 and 3 × 3 on the square to what they are of;
   the class token passes it by.

The attention of bags of at most ``landmarks`` tokens is exact, of others Nyström's (see
nystroem.py). The published code approximates always, after zeros in front up to a multiple of the
landmarks, which its softmaxes do not mask: on n < 256 rows most landmarks are zeros then. The
convolution over V is the same in both, as V of those zeros is 0. No dropout is inside; the
published code has 0.1 on what leaves each attention. PPEG makes
the order of the instances matter, and so do the repeated ones. No attention is given: a
pseudo-inverse makes weights of both signs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import TransmilOptions
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import resampled
from dragn_cache.ragged.nystroem import STEPS, nystroem
from dragn_cache.ragged.padded import (
    Group,
    Linear,
    Padding,
    attend,
    firsts,
    split,
    with_first,
)


class Transmil(Aggregator, declared="transmil"):
    """Embedding (B, embed): the class token's row; no attention.

    Args:
        in_shape: (C, h, w) or (C,); maps are averaged over h and w.
        options: `TransmilOptions`.
    """

    options: TransmilOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        embed, heads = self.options.embed, self.options.heads
        self.embed = Linear(self.out_dim, embed)
        self.cls = nn.Parameter(torch.randn(embed))
        self.before = TokenAttention(embed, heads)
        self.positions = Pyramid(embed)
        self.after = TokenAttention(embed, heads)
        self.norm = nn.LayerNorm(embed)
        self.out_dim = embed

    def bag_values(self, n: int, *, training: bool) -> float:
        """Those of the rows, and of a bag's products of landmarks with landmarks."""
        products = self.options.heads * self.options.landmarks**2
        steps = (13 * STEPS if training else 6) * (n > self.options.landmarks)
        return super().bag_values(n, training=training) + steps * products

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        x = F.relu(self.embed(self.vectors(bags)))
        sides = square_sides(bags.offsets)
        long = torch.from_numpy(sides**2 + 1 > self.options.landmarks)
        results, order = [], []
        for landmarks, chosen in ((None, ~long), (self.options.landmarks, long)):
            numbers = chosen.nonzero().flatten()
            if len(numbers):
                some = RaggedBags(x, bags.offsets)
                some = some if len(numbers) == len(bags) else some.select(numbers)
                results.append(self._embeddings(some, landmarks))
                order.append(numbers)
        back = torch.cat(order).argsort().to(x.device)
        return Aggregated(torch.cat(results).index_select(0, back), None)

    def _embeddings(self, bags: RaggedBags, landmarks: int | None) -> Tensor:
        """(B, embed) of embedded instances; ``landmarks`` None is exact attention."""
        rows, squares = squared(bags.offsets)
        x = bags.values.index_select(0, rows.to(bags.values.device))
        x, offsets = with_first(self.cls, x, squares)
        padding = Padding(offsets, x.device)
        x = self.before(x, offsets, padding, landmarks)
        x = self.positions(x, offsets)
        x = self.after(x, offsets, padding, landmarks)
        result: Tensor = self.norm(firsts(x, offsets))
        return result


class TokenAttention(nn.Module):
    """x + A(LN(x)): (N, embed) → (N, embed)."""

    def __init__(self, embed: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(embed)
        self.qkv = Linear(embed, 3 * embed, bias=False)
        self.local = nn.Conv2d(heads, heads, (33, 1), padding=(16, 0), groups=heads, bias=False)
        self.o = Linear(embed, embed)

    def forward(
        self, x: Tensor, offsets: Tensor, padding: Padding, landmarks: int | None
    ) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, 1)
        if landmarks is None:
            mixed = attend(q, k, v, padding, heads=self.heads)
        else:
            mixed = nystroem(q, k, v, offsets, padding, heads=self.heads, landmarks=landmarks)
        result: Tensor = x + self.o(mixed + padding.map(self._convolved, v))
        return result

    def _convolved(self, v: Tensor, group: Group) -> Tensor:
        convolved: Tensor = self.local(split(group.zeroed(v), self.heads))
        return convolved.transpose(1, 2).flatten(2)


class Pyramid(nn.Module):
    """PPEG on bags of a class token and s² rows: (N, embed) → (N, embed)."""

    def __init__(self, embed: int) -> None:
        super().__init__()
        self.conv7, self.conv5, self.conv3 = (
            nn.Conv2d(embed, embed, size, padding=size // 2, groups=embed) for size in (7, 5, 3)
        )

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        padding = Padding(offsets, x.device, exact=True)
        return padding.map(self._positioned, x)

    def _positioned(self, tokens: Tensor, group: Group) -> Tensor:
        count, width = tokens.shape[1:]
        side = math.isqrt(count)
        square = tokens[:, 1:].transpose(1, 2).reshape(-1, width, side, side)
        # Four maps that are added up are one, of the largest kernel.
        square = F.conv2d(square, *self._joined(), padding=3, groups=width)
        return torch.cat((tokens[:, :1], square.flatten(2).transpose(1, 2)), 1)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """One kernel (embed, 1, 7, 7) and bias (embed,) for the convolutions and the identity."""
        wide, middle, narrow = self.conv7.weight, self.conv5.weight, self.conv3.weight
        identity = F.pad(wide.new_ones(1, 1, 1, 1), [3] * 4)
        kernel = wide + F.pad(middle, [1] * 4) + F.pad(narrow, [2] * 4) + identity
        biases = [conv.bias for conv in (self.conv7, self.conv5, self.conv3)]
        return kernel, torch.stack([bias for bias in biases if bias is not None]).sum(0)


def square_sides(offsets: Tensor) -> NDArray[np.int64]:
    """(B,) int64: ⌈√n⌉ of each bag."""
    sides: NDArray[np.int64] = np.ceil(np.sqrt(np.diff(offsets.numpy()))).astype(np.int64)
    return sides


def squared(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (Σ s²,) that fill each bag up to a square, its first ones repeated; their offsets."""
    return resampled(offsets, torch.from_numpy(square_sides(offsets) ** 2))
