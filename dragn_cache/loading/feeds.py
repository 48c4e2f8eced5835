"""Feeds: batches of bags for a model, from features in memory or streamed from a store.

Training asks for ``epoch``, every presentation of the training bags once in a random order;
evaluation for ``in_order``, some bags in the manifest's order. Both give whole bags.

- **Resident**: one array; a batch of training is one gather, a batch of evaluation a view where its
  bags are neighbours and lie as a copy would.
- **Streamed**: a block of bags is read in the background while the one before is used, so that two
  blocks, the byte budget, are all that is in memory; a larger bag is a block by itself. A block
  is made of runs of neighbouring bags, drawn from everywhere, and its bags are shuffled
  among each other.

Streamed batches are those of resident bags, bit for bit, where one block holds all training bags
and, at evaluation, a third of the budget holds `EVALUATION_ROWS` instances. Otherwise evaluation's
are smaller: products of matrices of another shape, whose last digits differ on some processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dragn_cache.loading.stored import StoredBags
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import joined, offsets_of

EVALUATION_ROWS = 4096  # instances of a batch at evaluation; a bag is never cut
ALIGNMENT = 64  # bytes: where PyTorch's allocator begins an array, and a store's reader as well

RUNS_PER_BLOCK = 16  # at the least, unless a bag is longer than that


class Feed(Protocol):
    """The source of training's batches."""

    def __len__(self) -> int:
        """P, how many bags an epoch shows."""

    def epoch(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[RaggedBags, Tensor]]:
        """Every presentation once, in a random order, in batches.

        Returns:
            for each batch b bags, and their numbers (b,) int64 as the targets count them.
        """


@dataclass(frozen=True)
class Presentations:
    """The P presentations of an epoch, from features in memory.

    Attributes:
        bags: the clean bags, then augmented views, as in ``LabelledBags.stacked``.
        numbers: (V, P) int64: the bags of which each presentation is mixed; V is 1 or all views.
        rows: (P,) int64: the bag that each presentation shows, as the targets count them.
        shuffle: whether the instances of each bag come in a random order.
    """

    bags: RaggedBags
    numbers: Tensor
    rows: Tensor
    shuffle: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[RaggedBags, Tensor]]:
        """See `Feed`; a batch is one gather."""
        for chosen in torch.split(torch.randperm(len(self), generator=generator), batch_size):
            if len(self.numbers) == 1:
                order = generator if self.shuffle else None
                yield self.bags.select(self.numbers[0, chosen], shuffle=order), self.rows[chosen]
            else:
                batch = self.bags.mixed(self.numbers[:, chosen], generator, shuffle=self.shuffle)
                yield batch, self.rows[chosen]


@dataclass(frozen=True)
class Streamed:
    """The training bags of a store too large for memory; see the module.

    Attributes:
        bags: all bags.
        rows: (T,) int64, the numbers of the training bags.
        shuffle: whether the instances of each bag come in a random order.
    """

    bags: StoredBags
    rows: Tensor
    shuffle: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def epoch(
        self, batch_size: int, generator: torch.Generator
    ) -> Iterator[tuple[RaggedBags, Tensor]]:
        """See `Feed`. What a block leaves of a batch is filled up from the next block."""
        order = generator if self.shuffle else None
        blocks = self.blocks(generator)
        coming = self.bags.read_ahead(blocks)
        kept: list[tuple[RaggedBags, Tensor]] = []
        waiting = 0
        for number, rows in enumerate(blocks, start=1):
            block = next(coming)
            shuffled = torch.randperm(len(rows), generator=generator)
            first = batch_size - waiting
            rest = torch.split(shuffled[first:], batch_size) if len(shuffled) > first else ()
            for chosen in (shuffled[:first], *rest):
                kept.append((block.select(chosen, shuffle=order), rows[chosen]))
                waiting += len(chosen)
                if waiting == batch_size or number == len(blocks):
                    batch = joined([bags for bags, _ in kept]).to(device=self.bags.device)
                    yield batch, torch.cat([shown for _, shown in kept])
                    kept, waiting = [], 0
            del block  # before the next but one is read

    def blocks(self, generator: torch.Generator) -> list[Tensor]:
        """The training bags, cut into blocks for one epoch: numbers (b,) of each."""
        limit = max(1, self.bags.budget // (2 * self.bags.tap.row_bytes))
        sizes = self.bags.offsets.diff()
        whole = _cut(self.rows, sizes, limit)
        if len(whole) == 1:
            return whole
        runs = _cut(self.rows, sizes, max(1, limit // RUNS_PER_BLOCK))
        drawn = torch.randperm(len(runs), generator=generator)
        return _cut(torch.cat([runs[k] for k in drawn.tolist()]), sizes, limit)


def in_order(bags: RaggedBags | StoredBags, numbers: Tensor | None = None) -> Iterator[RaggedBags]:
    """Some bags (None: all) in the order of their numbers, about `EVALUATION_ROWS` at a time.

    Args:
        numbers: (b,) int64, on the host.
    """
    numbers = torch.arange(len(bags)) if numbers is None else numbers
    if isinstance(bags, StoredBags):
        # Three at a time: the caller's, the one that is ready, and the one that is being read.
        limit = min(EVALUATION_ROWS, bags.budget // (3 * bags.tap.row_bytes))
        for batch in bags.read_ahead(_evenly(numbers, bags.offsets.diff(), max(1, limit))):
            yield batch.to(device=bags.device)
        return
    for chosen in _evenly(numbers, bags.offsets.diff(), EVALUATION_ROWS):
        first, last = int(chosen[0]), int(chosen[-1])
        neighbours = last - first + 1 == len(chosen) and bool((chosen.diff() == 1).all())
        # Some BLAS (MKL on AMD) give a product other last digits where its rows begin elsewhere.
        aligned = bags.bag(first).data_ptr() % ALIGNMENT == 0
        yield bags.between(first, last + 1) if neighbours and aligned else bags.select(chosen)


def _evenly(numbers: Tensor, sizes: Tensor, rows: int) -> list[Tensor]:
    """Bags cut where their running number of instances passes a multiple of ``rows``."""
    block = offsets_of(sizes[numbers])[:-1] // rows
    counts = torch.unique_consecutive(block, return_counts=True)[1]
    return list(torch.split(numbers, counts.tolist()))


def _cut(numbers: Tensor, sizes: Tensor, most: int) -> list[Tensor]:
    """Bags cut into pieces of at most ``most`` instances; a larger bag is a piece of its own."""
    counts, filled = [0], 0
    for size in sizes[numbers].tolist():
        if counts[-1] and filled + size > most:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return list(torch.split(numbers, counts))
