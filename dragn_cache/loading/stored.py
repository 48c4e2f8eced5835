"""Bags in a store as a sequence: read when asked for, whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.devices import CPU
from dragn_cache.loading.labelling import Labelling
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.store import Store, Tap
from dragn_cache.types import Warn


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


def usable_bags(
    store: Store, labelling: Labelling, warn: Warn
) -> tuple[Labelling, NDArray[np.int64]]:
    """The bags that have a usable instance, and their numbers of instances (B,)."""
    sizes = store.sizes(labelling.ids)
    kept = sizes > 0
    if kept.all():
        return labelling, sizes
    left_out = [bag.bag_id for bag, keep in zip(labelling.bags, kept, strict=True) if not keep]
    some = ", ".join(left_out[:5])
    warn(f"{len(left_out)} bags have no usable instance and are left out: {some}")
    bags = tuple(b for b, keep in zip(labelling.bags, kept, strict=True) if keep)
    return replace(labelling, bags=bags), sizes[kept]


def load_bags(
    store: Store, tap: Tap, labelling: Labelling, memory: int, warn: Warn
) -> tuple[Labelling, RaggedBags | StoredBags]:
    """The features of the labelled bags; bags without a usable instance are left out.

    Args:
        memory: bytes that they may fill; larger ones stay in the store.
    """
    labelling, sizes = usable_bags(store, labelling, warn)
    needed = int(sizes.sum()) * tap.row_bytes
    if needed > memory:
        warn(
            f"the features of {tap.name} ({needed / 1e9:.3g} GB) are more than the "
            f"{memory / 1e9:.3g} GB of memory for them: they are streamed from the store"
        )
        offsets = offsets_of(torch.from_numpy(sizes))
        return labelling, StoredBags(store, tap, tuple(labelling.ids), offsets, memory)
    values, bounds = store.load(tap.name, bags=labelling.ids)
    return labelling, RaggedBags(torch.from_numpy(values), torch.from_numpy(bounds))
