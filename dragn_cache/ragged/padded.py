"""Ragged bags as padded batches with masks, and multi-head attention inside each bag.

- Only attention pads rows; what treats each row by itself (linear layers, norms) keeps them ragged.
- A bag of n rows is padded to ``padded_width(n)`` places. Its own size alone decides this: a long
  bag does not make others long, and a bag is computed in the same shape, hence in the same order
  of summation, whatever its batch mates are. Bags of one width share a batch.
- A place without an instance repeats the first row of its bag and is masked as a key: no row of
  scores is masked as a whole, so no place that nothing reads gives an infinity or NaN.
- The library's scaled_dot_product_attention does the rest; its kernels hold no n × n matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dragn_cache.ragged.bags import owners

# Lanes of the widest CPU vectors in float32: a row of scores is summed in such steps.
LANES = 16
# Fewer rows than this may take another kernel, with another order of summation.
FEWEST_ROWS = 16


@dataclass(frozen=True)
class Group:
    """b bags of at most n rows as one padded batch.

    Attributes:
        bags: (b,) int64, numbers of the bags.
        rows: (b, n) int64, the row at each place; a bag's first row at places without a row.
        mask: (b, n) bool, True at places with a row; None where all places have one.
    """

    bags: Tensor
    rows: Tensor
    mask: Tensor | None

    def padded(self, values: Tensor) -> Tensor:
        """(N, …) → (b, n, …): the rows of these bags; padding repeats a bag's first row."""
        places = values.index_select(0, self.rows.flatten())
        return places.view(*self.rows.shape, *values.shape[1:])

    def zeroed(self, batch: Tensor) -> Tensor:
        """(b, n, …) with zeros where there is no row."""
        if self.mask is None:
            return batch
        return batch.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (batch.dim() - 2)), 0)


class Padding:
    """The layout of N rows of B bags in padded batches.

    Args:
        offsets: (B + 1,) int64, on the host; no bag may be empty.
        device: where the rows are.
        exact: one batch for each size, without any padding.

    Attributes:
        groups: the batches, bags of a batch in their order.
        bags: B.
    """

    def __init__(
        self, offsets: Tensor, device: torch.device | str = "cpu", *, exact: bool = False
    ) -> None:
        starts, sizes = offsets.numpy()[:-1], np.diff(offsets.numpy())
        widths = sizes if exact else padded_width(sizes)
        self.groups: list[Group] = []
        self.bags = len(sizes)
        place, places = np.empty(int(offsets[-1]), np.int64), 0
        order = [np.zeros(0, np.int64)]
        for width in np.unique(widths):
            bags = np.flatnonzero(widths == width)
            columns = np.arange(width)
            mask = columns < sizes[bags, None]
            rows = starts[bags, None] + np.where(mask, columns, 0)
            place[rows[mask]] = places + np.flatnonzero(mask)
            places += rows.size
            order.append(bags)
            self.groups.append(
                Group(
                    torch.from_numpy(bags).to(device),
                    torch.from_numpy(rows).to(device),
                    None if mask.all() else torch.from_numpy(mask).to(device),
                )
            )
        self._place = torch.from_numpy(place).to(device)
        self._order = torch.from_numpy(np.argsort(np.concatenate(order))).to(device)

    def ragged(self, batches: Sequence[Tensor]) -> Tensor:
        """One (b, n, …) for each group → (N, …): the rows in their order, padding left out."""
        return torch.cat([batch.flatten(0, 1) for batch in batches]).index_select(0, self._place)

    def dense(self, batches: Sequence[Tensor]) -> Tensor:
        """One (b, …) for each group → (B, …): the bags in their order."""
        return torch.cat(list(batches)).index_select(0, self._order)

    def map(self, function: Callable[[Tensor, Group], Tensor], values: Tensor) -> Tensor:
        """(N, …) → (N, …): ``function`` on the padded rows (b, n, …) of each group."""
        return self.ragged([function(group.padded(values), group) for group in self.groups])


def padded_width(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places for bags of ``sizes``: 16, 32 … 128, then at most a quarter more than the size."""
    step = np.maximum(LANES, 2 ** np.frexp(np.maximum(sizes - 1, 1))[1] // 8)
    widths: NDArray[np.int64] = -(-sizes // step) * step
    return widths


class Linear(nn.Linear):
    """nn.Linear whose result for a row does not depend on the number of rows.

    On CPUs one to three rows take another kernel, which sums in another order.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        rows = x.shape[:-1].numel()
        if rows >= FEWEST_ROWS:
            return super().forward(x)
        filled = F.pad(x.reshape(rows, -1), (0, 0, 0, FEWEST_ROWS - rows))
        return super().forward(filled)[:rows].view(*x.shape[:-1], -1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, padding: Padding, *, heads: int, scale: float | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v in each bag and head.

    Args:
        q, k, v: each (N, D), a row for each instance, or (B, m, D), m rows for each bag. Heads are
            slices of D; v may have another D than q and k.
        padding: of the instances.
        scale: of the scores; 1/√(D / heads) unless given.

    Returns:
        the shape of q, with the D of v.
    """
    results = []
    for group in padding.groups:
        queries, keys, values = (
            split(group.padded(x) if x.dim() == 2 else x.index_select(0, group.bags), heads)
            for x in (q, k, v)
        )
        mask = None if k.dim() == 3 or group.mask is None else group.mask[:, None, None]
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
        results.append(mixed.transpose(1, 2).flatten(2))
    return padding.ragged(results) if q.dim() == 2 else padding.dense(results)


def attention_seconds(n: int, width: int) -> float:
    """About the seconds that `attend` takes for n rows, forward and backward, on one core.

    Measured on an AVX-512 core at n = 10,000: 2e-10 seconds for each two rows and each of the
    values (D) of a row.

    Args:
        width: D, summed up over the layers.
    """
    return 2e-10 * n**2 * width


def split(x: Tensor, heads: int) -> Tensor:
    """(b, n, D) → (b, heads, n, D / heads)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def with_first(row: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) in front of the rows (N, D) of each bag: (N + B, D), and its offsets."""
    bags = len(offsets) - 1
    # Row i of bag b moves b + 1 places on; number N is the row that is put in front.
    source = np.full(len(values) + bags, len(values))
    source[np.arange(len(values)) + owners(offsets).numpy() + 1] = np.arange(len(values))
    rows = torch.from_numpy(source).to(values.device)
    return torch.cat((values, row[None])).index_select(0, rows), offsets + torch.arange(bags + 1)


def firsts(values: Tensor, offsets: Tensor) -> Tensor:
    """(N, D) → (B, D): the first row of each bag."""
    return values.index_select(0, offsets[:-1].to(values.device))


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis; places where ``mask`` (broadcast) is False get 0."""
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)
