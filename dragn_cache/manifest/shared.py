"""Images that bags share although they may come to lie on two sides of a split: a leak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dragn_cache.manifest.records import Bag
from dragn_cache.types import Warn

# Odd numbers at random: a sum of a box's numbers times these is another for another box.
_MIXED = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)


@dataclass(frozen=True)
class Shared:
    """Two bags that share images, by their numbers; the key of one such image, and their number."""

    first: int
    other: int
    key: int
    images: int


def image_keys(digests: NDArray[np.uint8], boxes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(n,): one number for what each instance shows.

    Two that show the same have the same; others too by chance, once in 10^7 sets of a million.

    Args:
        digests: (n, 8 or more), of the images.
        boxes: (n, 4), in pixels of the image.
    """
    first = np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
    mixed: NDArray[np.uint64] = (boxes.astype(np.uint64) * _MIXED).sum(axis=1, dtype=np.uint64)
    return first + mixed


def find_shared(
    bags: Sequence[Bag],
    members: NDArray[np.int64],
    keys: NDArray[np.uint64],
    sides: Sequence[str] | None = None,
) -> list[Shared]:
    """Bags that share an image with the first bag that has it, and need not stay on its side.

    Args:
        members: (n,) the number of the bag that each instance is in.
        keys: (n,) of the instances, see `image_keys`.
        sides: the bags' sides of a split, where they are known; else the groups tell.
    """
    order = np.lexsort((members, keys))
    keys, members = keys[order], members[order]
    same = keys[1:] == keys[:-1]
    repeated = np.flatnonzero(same & (members[1:] != members[:-1])) + 1
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    firsts = members[starts[np.searchsorted(starts, repeated, side="right") - 1]]
    found: dict[tuple[int, int], Shared] = {}
    for row, first in zip(repeated.tolist(), firsts.tolist(), strict=True):
        pair = first, int(members[row])
        if not _together(bags, *pair, sides):
            before = found.get(pair)
            count = 1 if before is None else before.images + 1
            found[pair] = Shared(*pair, int(keys[row]), count)
    return sorted(found.values(), key=lambda shared: (shared.other, shared.first))


def _together(bags: Sequence[Bag], first: int, other: int, sides: Sequence[str] | None) -> bool:
    """Whether two bags are on one side, or in one group and so always will be."""
    if sides is not None:
        return sides[first] == sides[other]
    return bool(bags[first].group) and bags[first].group == bags[other].group


def warn_shared(
    bags: Sequence[Bag],
    shared: Sequence[Shared],
    what: str,
    warn: Warn,
    sides: Sequence[str] | None = None,
) -> None:
    """Report bags that share images, or all they have: ``what`` is the same."""
    if not shared:
        return
    where = "on two sides of the split" if sides else "perhaps on two sides of a fold"
    first, other = bags[shared[0].first].bag_id, bags[shared[0].other].bag_id
    more = f", and {len(shared) - 1} more such" if len(shared) > 1 else ""
    warn(f"bags with the same {what} {where}: {first!r} and {other!r}{more}; give them one group")
