"""Same-padded convolutions of small maps as dense matrices: sums of weighted shifts."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

DENSE_PIXELS = 64  # the largest map whose convolutions are products with a matrix


@cache
def shift_matrices(height: int, width: int, kernel: int) -> Tensor:
    """(kernel², h w, h w) of 0 and 1: entry (t, p, q) is 1 where tap t carries pixel p to q."""
    y, x = torch.arange(height), torch.arange(width)
    offset = torch.arange(kernel) - kernel // 2
    rows = (y[:, None] == y + offset[:, None, None]).float()  # (kernel, h, h)
    columns = (x[:, None] == x + offset[:, None, None]).float()  # (kernel, w, w)
    pixels = height * width
    return torch.einsum("apq,bxz->abpxqz", rows, columns).reshape(kernel**2, pixels, pixels)
