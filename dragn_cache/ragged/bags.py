"""RaggedBags: many bags of features as one array of rows plus offsets, the batch of stage two.

Layout. Bag ``i`` is the rows ``offsets[i] : offsets[i + 1]`` of ``values``, in order; nothing is
padded, so B bags with N instances in total take N rows whatever their sizes are::

    values   (N, C, h, w) maps, or (N, C) vectors; any floating dtype, any device
    offsets  (B + 1,) int64: 0 = offsets[0] <= offsets[1] <= ... <= offsets[B] = N

- Offsets stay on the host, wherever the values are: the sizes decide the shapes of all results,
  and reading them from a device would wait for all work on it.
- A bag may have zero rows (none of its instances was usable) and keeps its place; aggregators
  raise an error for it.
- ``select`` and ``mixed`` make batches by one gather of the rows, shuffling included; ``between``
  gives consecutive bags as a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dragn_cache.errors import InputError

CONVERTED_VALUES = 1 << 19  # of maps, converted at a time: 4 MB in double precision


@dataclass(frozen=True, eq=False)
class RaggedBags:
    """B bags with N instances in total, checked once, when created.

    Args:
        values: (N, C) or (N, C, h, w), floating point; not copied.
        offsets: (B + 1,) int64, on the CPU or on the device of ``values``; kept on the CPU.

    Raises:
        InputError: other shapes or dtypes, or offsets that do not rise from 0 to N.
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        _require_values(self.values)
        object.__setattr__(self, "offsets", self.offsets.detach().to("cpu"))
        _require_offsets(self.offsets, rows=len(self.values))

    @classmethod
    def from_list(cls, bags: Sequence[Tensor]) -> RaggedBags:
        """Join bags (n, C) or (n, C, h, w) of one C, h, w, dtype and device; at least one bag."""
        if not bags:
            raise InputError(
                "RaggedBags.from_list",
                expected="at least one bag",
                got="an empty list",
                remedy="leave out batches without bags",
            )
        first = bags[0]
        for i, bag in enumerate(bags):
            if (bag.shape[1:], bag.dtype) != (first.shape[1:], first.dtype):
                raise InputError(
                    f"RaggedBags.from_list, bag {i}",
                    expected=f"instances {tuple(first.shape[1:])} {first.dtype}, as in bag 0",
                    got=f"{tuple(bag.shape[1:])} {bag.dtype}",
                    remedy="give all bags the features of one tap in one dtype",
                )
        sizes = torch.tensor([len(bag) for bag in bags])
        return cls(torch.cat(list(bags)), offsets_of(sizes))

    def __len__(self) -> int:
        """B, the number of bags."""
        return len(self.offsets) - 1

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one instance: (C, h, w) or (C,)."""
        return tuple(self.values.shape[1:])

    @property
    def sizes(self) -> Tensor:
        """(B,) int64, the instances of each bag, on the device of ``values``."""
        return self.offsets.diff().to(self.values.device)

    @property
    def segment_ids(self) -> Tensor:
        """(N,) int64, the bag of each instance, on the device of ``values``."""
        return owners(self.offsets).to(self.values.device)

    def bag(self, index: int) -> Tensor:
        """One bag's rows (n, C[, h, w]), a view; ``index`` is 0..B-1."""
        if not 0 <= index < len(self):
            raise _no_such_bag("RaggedBags.bag", index, len(self))
        start, end = self.offsets[index : index + 2].tolist()
        return self.values[start:end]

    def select(
        self, indices: Tensor | Sequence[int], *, shuffle: torch.Generator | None = None
    ) -> RaggedBags:
        """The bags at ``indices`` (0..B-1, repeats allowed), in that order, as one gather.

        With ``shuffle``, the instances are then in the order of ``permuted(shuffle)``.
        """
        chosen = torch.as_tensor(indices, device="cpu")
        if chosen.numel() == 0:
            chosen = chosen.to(torch.int64)
        # Index arithmetic is NumPy's: on the few bags of a batch torch takes 5 times as long.
        if chosen.dim() != 1 or chosen.dtype not in (torch.int64, torch.int32):
            raise InputError(
                "RaggedBags.select",
                expected="a 1-D list of bag numbers, int64",
                got=f"shape {tuple(chosen.shape)}, {chosen.dtype}",
                remedy="turn a mask into numbers with mask.nonzero().flatten()",
            )
        numbers, edges = chosen.numpy(), self.offsets.numpy()
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(outside):
            raise _no_such_bag("RaggedBags.select", int(outside[0]), len(self))
        firsts = edges[numbers]
        sizes = edges[numbers + 1] - firsts
        offsets = np.zeros(len(numbers) + 1, np.int64)
        np.cumsum(sizes, out=offsets[1:])
        # Row r of the result lies in bag numbers[k] at place r - offsets[k].
        rows = torch.from_numpy(np.arange(offsets[-1]) + np.repeat(firsts - offsets[:-1], sizes))
        result = torch.from_numpy(offsets)
        if shuffle is not None:
            rows = rows[_shuffled(result, shuffle)]
        return RaggedBags(self._gather(rows), result)

    def mixed(
        self, numbers: Tensor, generator: torch.Generator, *, shuffle: bool = False
    ) -> RaggedBags:
        """One bag for each column of ``numbers``, mixed from the column's bags, as one gather.

        Instance i of the result is instance i of one of the column's bags. That bag is drawn for
        each instance, all equally likely.

        Args:
            numbers: (V, k) int64, numbers of bags; those of a column have equally many instances.
            generator: on the CPU.
            shuffle: then permute the instances of each bag, by the same generator.
        """
        all_sizes = self.offsets.diff()[numbers]
        sizes = all_sizes[0]
        uneven = (all_sizes != sizes).any(0).nonzero().flatten()
        if len(uneven):
            column = int(uneven[0])
            raise InputError(
                f"RaggedBags.mixed, bags {numbers[:, column].tolist()}",
                expected="equally many instances",
                got=str(all_sizes[:, column].tolist()),
                remedy="mix views of one bag only",
            )
        offsets = offsets_of(sizes)
        bag = owners(offsets)
        drawn = torch.randint(len(numbers), (len(bag),), generator=generator)
        place = torch.arange(len(bag)) - offsets[bag]
        rows = self.offsets[numbers[drawn, bag]] + place
        if shuffle:
            rows = rows[_shuffled(offsets, generator)]
        return RaggedBags(self._gather(rows), offsets)

    def first(self, count: int) -> RaggedBags:
        """The first ``count`` bags, in the same memory."""
        return self.between(0, count)

    def between(self, first: int, last: int) -> RaggedBags:
        """The bags ``first`` to ``last - 1``, in the same memory."""
        offsets = self.offsets[first : last + 1]
        return RaggedBags(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def permuted(self, generator: torch.Generator) -> RaggedBags:
        """The same bags with the instances of each in a random order (all orders equally likely).

        The same generator state gives the same order; a CPU generator gives it on every device.
        """
        return RaggedBags(self._gather(_shuffled(self.offsets, generator)), self.offsets)

    def to(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> RaggedBags:
        """The same bags with the values on another device, in another floating dtype, or both."""
        values = self.values.to(
            device=self.values.device if device is None else device,
            dtype=self.values.dtype if dtype is None else dtype,
        )
        return RaggedBags(values, self.offsets)

    def _gather(self, rows: Tensor) -> Tensor:
        return self.values.index_select(0, rows.to(self.values.device))


def offsets_of(sizes: Tensor) -> Tensor:
    """Offsets (B + 1,) int64 of bags of ``sizes`` (B,) instances."""
    return torch.cat((sizes.new_zeros(1), sizes.cumsum(0))).to(torch.int64)


def owners(offsets: Tensor) -> Tensor:
    """(N,) int64, on the host: the bag of each row."""
    # NumPy's repeat takes 5 µs for a small batch, torch's repeat_interleave 100.
    return torch.from_numpy(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets.numpy())))


def resampled(offsets: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that make bags of other sizes: repeated in order, or evenly spaced.

    Args:
        offsets: (B + 1,) of bags that are not empty, on the host.
        sizes: (B,), the new sizes. A bag of n instances gives m < n as its rows ⌊p n / m⌋ for
            p = 0 … m - 1, and m > n as all its rows in order, again and again.

    Returns:
        rows (sum of sizes,) and their offsets (B + 1,).
    """
    new_offsets = offsets_of(sizes)
    bag, starts = owners(new_offsets).numpy(), offsets.numpy()
    place = np.arange(len(bag)) - new_offsets.numpy()[bag]
    n, m = np.diff(starts)[bag], sizes.numpy()[bag]
    place = np.where(n > m, place * n // m, place % n)
    return torch.from_numpy(starts[bag] + place), new_offsets


def joined(batches: Sequence[RaggedBags]) -> RaggedBags:
    """The bags of several batches, one after the other; one batch is itself, not a copy."""
    if len(batches) == 1:
        return batches[0]
    sizes = torch.cat([bags.offsets.diff() for bags in batches])
    return RaggedBags(torch.cat([bags.values for bags in batches]), offsets_of(sizes))


def averaged(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Maps (N, C, h, w) of any floating dtype to (N, C) in ``dtype``: the means over h and w.

    On a CPU, values of another dtype are converted some rows at a time, which then stay in the
    cache: to allocate a copy of all would take longer than to read it.
    """
    if values.dtype == dtype or values.device.type != "cpu":
        return values.mean((2, 3), dtype=dtype)
    rows = max(1, CONVERTED_VALUES // max(1, values.shape[1:].numel()))
    return torch.cat([piece.mean((2, 3), dtype=dtype) for piece in torch.split(values, rows)])


def _shuffled(offsets: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) int64: the rows of each bag in a random order, bag after bag."""
    rows = torch.randperm(int(offsets[-1]), generator=generator, device=generator.device).to("cpu")
    # A stable sort by bag of all rows in random order leaves each bag's rows in random order.
    return rows[owners(offsets)[rows].argsort(stable=True)]


def _require_values(values: Tensor) -> None:
    if values.dim() not in (2, 4) or not values.is_floating_point() or 0 in values.shape[1:]:
        raise InputError(
            "RaggedBags values",
            expected="(N, C) or (N, C, h, w), a floating dtype, C, h and w at least 1",
            got=f"{tuple(values.shape)} {values.dtype}",
            remedy="give one row per instance, as the store holds them",
        )


def _require_offsets(offsets: Tensor, *, rows: int) -> None:
    def error(got: str) -> InputError:
        return InputError(
            "RaggedBags offsets",
            expected=f"(B + 1,) int64 that starts at 0, never falls and ends at N = {rows}",
            got=got,
            remedy="give the running sum of the bag sizes with a 0 in front",
        )

    if offsets.dim() != 1 or offsets.dtype != torch.int64 or len(offsets) == 0:
        raise error(f"{tuple(offsets.shape)} {offsets.dtype}")
    edges = offsets.numpy()
    if edges[0] != 0:
        raise error(f"a start at {edges[0]}")
    if edges[-1] != rows:
        raise error(f"an end at {edges[-1]}")
    falls = np.flatnonzero(np.diff(edges) < 0)
    if len(falls):
        i = falls[0]
        raise error(f"{edges[i]} before {edges[i + 1]} at bag {i}")


def _no_such_bag(where: str, index: int, count: int) -> InputError:
    return InputError(
        where,
        expected=f"a bag number from 0 to {count - 1}",
        got=str(index),
        remedy="count bags from 0, in the order of the offsets",
    )
