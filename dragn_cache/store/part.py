"""One part: its contents, the digests of its bags, and the protocol that every format follows.

A format is a class with the methods of `PartFormat`; `FORMATS` in the package maps its name to it.
The contract is tested once, over all formats.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import DamagedPartError, foreign
from dragn_cache.store.schema import StoreDescription, Tap

BLOCK_BYTES = 16 * 2**20
FAILURE_COLUMNS = ("bag_id", "image", "box", "reason")
GROUPS = {
    "bags": ("id", "offsets", "digest", "plan"),
    "instances": ("image", "box", "order", "digest"),
    "failures": FAILURE_COLUMNS,
}
"""The arrays of a part's index, in writing order; each group has a seal beside them."""
SEAL = "seal"

Array = NDArray[Any]
Seals = dict[str, bytes | None]
"""The recorded `seal` of each group that was read; None in parts of older versions."""


@dataclass(frozen=True)
class Failure:
    """An input that could not be used. ``image`` is empty when a whole bag has none."""

    bag_id: str
    image: str
    box: str
    reason: str


@dataclass(frozen=True)
class PartIndex:
    """Everything in a part except the features.

    Attributes:
        ids: bag ids, b of them.
        offsets: (b+1,) int64; bag k has rows offsets[k]:offsets[k+1].
        digests: (b, 32) uint8, see `bag_digests`.
        plans: (b, 32) uint8, digests of the instances planned for each bag, see `plan.bag_plan`.
        images: manifest path of each row.
        boxes: (rows, 4) int64, x0 y0 x1 y1 in pixels of the image, half-open (whole image: its
            extent).
        order: (rows,) int64, position in the bag.
        image_digests: (rows, 32) uint8, sha256 of the image file's bytes.
        failures: inputs of this part's bags that could not be used.
        seals: as read from a file; empty in an index that is still to be written.
    """

    ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    digests: NDArray[np.uint8]
    plans: NDArray[np.uint8]
    images: tuple[str, ...]
    boxes: NDArray[np.int64]
    order: NDArray[np.int64]
    image_digests: NDArray[np.uint8]
    failures: tuple[Failure, ...] = field(default=())
    seals: Seals = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class BagRows:
    """The rows of each bag: as much of a part's index as loading needs.

    Attributes:
        ids: bag ids, b of them.
        offsets: (b+1,) int64; bag k has rows offsets[k]:offsets[k+1].
        rows: the number of rows in the part.
        seals: that of the group ``bags``.
    """

    ids: tuple[str, ...]
    offsets: NDArray[np.int64]
    rows: int
    seals: Seals


def require_sealed(bags: BagRows | PartIndex, description: StoreDescription) -> None:
    """Raise ValueError unless every group that was read has a seal, where the store's parts must.

    That the seals are those of their groups was compared when they were read.
    """
    for group, recorded in bags.seals.items():
        if recorded is None and description.is_sealed:
            raise ValueError(f"no {group}/{SEAL}")


def require_bags(bags: BagRows | PartIndex, planned: Sequence[str]) -> None:
    """Raise ValueError unless a part holds the planned bags, in order, and its offsets are sound.

    It may hold others: bags that an update has since moved to a newer part, or dropped.
    """
    ids = iter(bags.ids)  # one iterator for all: each id is searched behind the one before it
    if not all(bag_id in ids for bag_id in planned):
        raise ValueError("other bags than planned")
    if bags.offsets.shape != (len(bags.ids) + 1,):
        raise ValueError(f"bags/offsets has shape {bags.offsets.shape}, not {len(bags.ids) + 1}")
    ends = bags.offsets[0] == 0 and bags.offsets[-1] == bags.rows
    if not ends or (np.diff(bags.offsets) < 0).any():
        raise ValueError("bags/offsets do not run from 0 to the number of rows")


def require_index(index: PartIndex, planned: Sequence[str]) -> None:
    """Raise ValueError unless a part's whole index is sound; see `require_bags`."""
    require_bags(index, planned)
    b, rows = len(index.ids), index.rows
    shapes = {
        "bags/digest": (index.digests.shape, (b, 32)),
        "bags/plan": (index.plans.shape, (b, 32)),
        "instances/box": (index.boxes.shape, (rows, 4)),
        "instances/order": (index.order.shape, (rows,)),
        "instances/digest": (index.image_digests.shape, (rows, 32)),
    }
    for name, (got, expected) in shapes.items():
        if got != expected:
            raise ValueError(f"{name} has shape {got}, not {expected}")


def reading_part(path: Path) -> AbstractContextManager[None]:
    """Turn every error of reading a part into `DamagedPartError`."""
    return foreign(
        path,
        expected="the part as it was written",
        remedy=f"run dragn-cache verify {path.parent.parent} `repair=True`, then extract again",
        kind=DamagedPartError,
    )


class Rows(Protocol):
    """Rows of one tap, readable in pieces."""

    def read(self, start: int, stop: int) -> Array: ...


class PartFormat(Protocol):
    """Writing and reading of parts. Paths are complete; the suffix belongs to the format."""

    suffix: str

    def write(
        self,
        path: Path,
        index: PartIndex,
        taps: Sequence[Tap],
        views: Sequence[str],
        rows: RowTable,
    ) -> None:
        """Write a whole part in one pass to a path that does not exist yet."""

    def try_reading(self, path: Path) -> None:
        """Raise ValueError if a library would not survive the part, which may come from others."""

    def read_index(self, path: Path) -> PartIndex:
        """Read everything but the features."""

    def read_bags(self, path: Path) -> BagRows:
        """Read the rows of each bag."""

    def read_rows(self, path: Path, tap: Tap, view: str, pieces: Pieces) -> None:
        """Fill every piece's array, straight from the file's bytes."""


Pieces = Sequence[tuple[int, Array]]
"""First row and the array (k, *tap.shape) for the k rows from there; at least one piece."""

RowTable = dict[tuple[str, str], Rows]
"""(tap name, view) → its rows."""


def blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def bag_digests(
    offsets: NDArray[np.int64], taps: Sequence[Tap], views: Sequence[str], table: RowTable
) -> NDArray[np.uint8]:
    """(b, 32): sha256 over each bag's rows, little-endian C order, taps in order, then views.

    Only the bag's own rows count, so its digest is the same in any part and in either format.
    """
    result = np.empty((len(offsets) - 1, 32), np.uint8)
    for bag in range(len(offsets) - 1):
        digest = hashlib.sha256()
        first, last = int(offsets[bag]), int(offsets[bag + 1])
        for tap in taps:
            for view in views:
                for start, stop in blocks(last - first, tap.row_bytes):
                    block = table[tap.name, view].read(first + start, first + stop)
                    digest.update(np.ascontiguousarray(block).data)
        result[bag] = np.frombuffer(digest.digest(), np.uint8)
    return result


def empty_rows(shape: tuple[int, ...], dtype: str) -> Array:
    """An array to read into, on a page boundary.

    ``np.empty`` puts a large array 16 bytes behind a page boundary. Some processors then copy from
    the page cache at a third of their speed: AMD's Zen 3 where the positions of source and target
    within their pages differ by 1 to 16 bytes, as for a part whose features start on a boundary.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + mmap.PAGESIZE, np.uint8)
    first = -memory.ctypes.data % mmap.PAGESIZE
    return memory[first : first + size].view(dtype).reshape(shape)


def require_extent(shape: tuple[int, ...], dtype: Any, tap: Tap, pieces: Pieces) -> None:
    """Raise ValueError unless an array holds the pieces' rows of a tap."""
    rows = max(start + len(out) for start, out in pieces)
    if shape[1:] != tap.shape or np.dtype(dtype) != np.dtype(tap.dtype) or shape[0] < rows:
        raise ValueError(f"{tap.name} has shape {shape} {dtype}")


def read_exactly(raw: FileIO, out: Array) -> None:
    """Fill an array from a raw file, or raise EOFError."""
    view = out.reshape(-1).view(np.uint8).data
    while len(view):
        count = raw.readinto(view)
        if not count:
            raise EOFError(f"the file ends {len(view)} bytes early")
        view = view[count:]


def seal(arrays: dict[str, Array]) -> bytes:
    """sha256 over a group's arrays, in order.

    For each array its name, its type (``utf-8``, ``int64`` or ``uint8``) and its sizes in decimal,
    joined by commas, each with a zero byte behind it; then its numbers as little-endian bytes, or
    each of its texts as UTF-8 and a zero byte.
    """
    digest = hashlib.sha256()
    for name, values in arrays.items():
        is_text = values.dtype.kind in "TOU"
        kind = "utf-8" if is_text else values.dtype.name
        digest.update(f"{name}\0{kind}\0{','.join(map(str, values.shape))}\0".encode())
        if is_text:
            digest.update("".join(f"{text}\0" for text in values.tolist()).encode())
        else:
            digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
    return digest.digest()


def index_arrays(index: PartIndex) -> dict[str, Array]:
    """A part's index as the named arrays that every format stores, in writing order."""

    def text(values: Sequence[str]) -> Array:
        return np.array(values, dtype=np.dtypes.StringDType())

    arrays = {
        "bags/id": text(index.ids),
        "bags/offsets": index.offsets,
        "bags/digest": index.digests,
        "bags/plan": index.plans,
        "instances/image": text(index.images),
        "instances/box": index.boxes,
        "instances/order": index.order,
        "instances/digest": index.image_digests,
    }
    for column in FAILURE_COLUMNS:
        arrays[f"failures/{column}"] = text([getattr(f, column) for f in index.failures])
    for group, names in GROUPS.items():
        sealed = seal({name: arrays[f"{group}/{name}"] for name in names})
        arrays[f"{group}/{SEAL}"] = np.frombuffer(sealed, np.uint8)
    return arrays


Read = Callable[[str], Array | None]
"""Reads an array of an index by its name (texts as objects or StringDType); None if absent."""


def read_group(read: Read, group: str) -> tuple[dict[str, Array], bytes | None]:
    """The arrays of a group by name, and its seal, which older parts do not have.

    Raises:
        ValueError: an array is missing, or they are not those that were sealed.
    """
    arrays: dict[str, Array] = {}
    for name in GROUPS[group]:
        values = read(f"{group}/{name}")
        if values is None:
            raise ValueError(f"no {group}/{name}")
        if values.dtype.kind in "TO" and any("\0" in text for text in values):
            raise ValueError(f"{group}/{name} has a null character, which no part is written with")
        arrays[name] = values
    recorded = read(f"{group}/{SEAL}")
    if recorded is None:
        return arrays, None
    if recorded.astype(np.uint8).tobytes() != seal(arrays):
        raise ValueError(f"{group} are not as their seal has them")
    return arrays, recorded.tobytes()


def index_from_arrays(read: Read) -> PartIndex:
    """Build a part's index from its arrays."""
    groups = {group: read_group(read, group) for group in GROUPS}
    bags, instances, failures = (arrays for arrays, _ in groups.values())
    columns = [[str(v) for v in failures[c]] for c in FAILURE_COLUMNS]
    return PartIndex(
        ids=tuple(str(v) for v in bags["id"]),
        offsets=bags["offsets"],
        digests=bags["digest"],
        plans=bags["plan"],
        images=tuple(str(v) for v in instances["image"]),
        boxes=instances["box"],
        order=instances["order"],
        image_digests=instances["digest"],
        failures=tuple(Failure(*row) for row in zip(*columns, strict=True)),
        seals={group: recorded for group, (_, recorded) in groups.items()},
    )


def bag_rows(read: Read, rows: int) -> BagRows:
    """Build the rows of each bag from the arrays of the group ``bags``."""
    arrays, recorded = read_group(read, "bags")
    ids = tuple(str(v) for v in arrays["id"])
    return BagRows(ids, arrays["offsets"], rows, {"bags": recorded})


def corner_coords(index: PartIndex) -> NDArray[np.int64]:
    """(n, 2): each box's corner (x0, y0); (order, 0) where all corners are the image's own."""
    corners = index.boxes[:, :2]
    if corners.any():
        return np.ascontiguousarray(corners)
    return np.stack([index.order, np.zeros_like(index.order)], axis=1)
