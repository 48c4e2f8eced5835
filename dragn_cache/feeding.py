"""How bags reach a model: batches of features that lie in memory, or that stream from a store.

Training asks for ``epoch``, every presentation of the training bags once in a random order;
evaluation for ``in_order``, some bags in the manifest's order. Both give whole bags.

- **Resident**: one array; a batch of training is one gather, a batch of evaluation a view where its
  bags are neighbours and lie as a copy would.
- **Streamed**: a block of bags is read in the background while the one before is used, so that two
  blocks, the byte budget, are all that is in memory (a bag that is larger than that is a block of
  its own). A block is made of runs of neighbouring bags, drawn from everywhere, and its bags are
  shuffled among each other.

Streamed batches are those of resident bags, bit for bit, where one block holds all training bags
and, at evaluation, a third of the budget holds `EVALUATION_ROWS` instances. Otherwise evaluation's
are smaller: products of matrices of another shape, whose last digits differ on some processors.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dragn_cache.bags import RaggedBags, joined, offsets_of
from dragn_cache.config import parse_memory
from dragn_cache.store import Store, Tap

EVALUATION_ROWS = 4096  # instances of a batch at evaluation; a bag is never cut
ALIGNMENT = 64  # bytes: where PyTorch's allocator begins an array, and a store's reader as well
CPU = torch.device("cpu")
RUNS_PER_BLOCK = 16  # at the least, unless a bag is longer than that


class Feed(Protocol):
    """What training takes its batches from."""

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
    """What the P presentations of an epoch show, from memory.

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
class StoredBags:
    """B bags that stay in their store and are read when they are needed.

    Attributes:
        store, tap: where the features are.
        ids: the bags' ids.
        offsets: (B + 1,) int64, as if all were in one array.
        budget: bytes that reading may fill.
        device: where batches go.
    """

    store: Store
    tap: Tap
    ids: tuple[str, ...]
    offsets: Tensor
    budget: int
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one instance: (C, h, w) or (C,)."""
        return self.tap.shape

    def to(self, *, device: torch.device) -> StoredBags:
        """The same bags, whose batches go to another device."""
        return replace(self, device=device)

    def read(self, numbers: Tensor) -> RaggedBags:
        """Some bags, in memory, in that order.

        Raises:
            StoreError: a part is missing or damaged.
        """
        ids = [self.ids[k] for k in numbers.tolist()]
        values, offsets = self.store.load(self.tap.name, bags=ids)
        return RaggedBags(torch.from_numpy(values), torch.from_numpy(offsets))

    def read_ahead(self, blocks: Sequence[Tensor]) -> Iterator[RaggedBags]:
        """Each block in turn; the next one is read while the caller works on it.

        A caller that has let go of its block when it asks for the next has two in memory at most.
        """
        with ThreadPoolExecutor(1, "feeding") as reader:
            coming = [reader.submit(self.read, block) for block in blocks[:1]]
            for following in [*blocks[1:], None]:
                read = [coming.pop().result()]
                if following is not None:
                    coming.append(reader.submit(self.read, following))
                yield read.pop()  # so that nothing here holds it any longer


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
    counts, held = [0], 0
    for size in sizes[numbers].tolist():
        if counts[-1] and held + size > most:
            counts.append(0)
            held = 0
        counts[-1] += 1
        held += size
    return list(torch.split(numbers, counts))


# --- how much memory there is ------------------------------------------------------------------

SHARE = 0.6  # of the free memory that features may fill


def memory_for_features(text: str, device: torch.device) -> int:
    """Bytes that features may fill: what ``--memory`` says; ``auto`` is 60 % of what is free."""
    given = parse_memory(text)
    if given is not None:
        return given
    free = free_memory()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return max(1, int(SHARE * free))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still have: the machine's, and its control group's."""
    free = sys.maxsize
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+)", (root / "proc/meminfo").read_text())
        if found:
            free = int(found[1]) * 1024
    group = root / "sys/fs/cgroup"
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such group, or "max": no limit
            most, taken = (int((group / name).read_text()) for name in (limit, used))
            # Files that were read count as used, although they give way.
            statistics = (group / limit).with_name("memory.stat")
            text = statistics.read_text() if statistics.is_file() else ""
            found = re.search(rf"^{cached} (\d+)$", text, re.MULTILINE)
            free = min(free, most - taken + (int(found[1]) if found else 0))
    return max(0, free)
