"""Self-attention of bags with many rows through landmarks, without an n × n matrix.

"Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention" (Xiong et al., 2021).
With m landmarks, the means of m stretches of neighbouring queries and keys,

    softmax(Q Kᵀ) V  ≈  softmax(Q K̃ᵀ) · Z · softmax(Q̃ Kᵀ) V,   Z ≈ softmax(Q̃ K̃ᵀ)⁺,

and Z is computed by a few steps of an iteration of third order. Two things differ from the usual
code. It pads the sequence with zeros to a multiple of m; the zeros then get attention and make
landmarks. Here the n rows are cut into m stretches of ⌊n/m⌋ or ⌈n/m⌉. And it scales the start of
the iteration by the largest sums among all heads and bags. Here each matrix is scaled by its own
sums, as in the paper, so that no bag depends on its batch mates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dragn_cache.ragged.padded import Padding, attend, split
from dragn_cache.ragged.segments import segment_mean

# Steps of the iteration for the pseudo-inverse; the paper's.
STEPS = 6


def nystroem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    padding: Padding,
    *,
    heads: int,
    landmarks: int,
) -> Tensor:
    """An approximation to ``attend`` for q, k, v (N, D): (N, D).

    Args:
        offsets: (B + 1,) int64, on the host; each bag has at least ``landmarks`` rows.
        padding: of these rows.
        landmarks: m.
    """
    edges = _stretches(offsets, landmarks)
    q_marks, k_marks = (segment_mean(x, edges).view(-1, landmarks, x.shape[1]) for x in (q, k))
    queries, keys = split(q_marks, heads), split(k_marks, heads)
    scale = queries.shape[3] ** -0.5
    middle = (scale * queries @ keys.transpose(2, 3)).softmax(3)  # (B, heads, m, m)
    gathered = split(attend(q_marks, k, v, padding, heads=heads), heads)
    values = pseudo_inverse(middle) @ gathered
    return attend(q, k_marks, values.transpose(1, 2).flatten(2), padding, heads=heads)


def pseudo_inverse(a: Tensor, steps: int = STEPS) -> Tensor:
    """(…, m, m) → (…, m, m): an approximate inverse of each matrix, by itself."""
    rows, columns = (a.abs().sum(axis).amax(-1)[..., None, None] for axis in (-1, -2))
    z = a.transpose(-1, -2) / (rows * columns)
    unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(steps):
        az = a @ z
        z = 0.25 * z @ (13 * unit - az @ (15 * unit - az @ (7 * unit - az)))
    return z


def _stretches(offsets: Tensor, count: int) -> Tensor:
    """(B · count + 1,) int64: the first row of each stretch, bag by bag, and the end."""
    starts, sizes = offsets.numpy()[:-1, None], np.diff(offsets.numpy())[:, None]
    begins = starts + np.arange(count) * sizes // count
    return torch.from_numpy(np.append(begins, int(offsets[-1])))
