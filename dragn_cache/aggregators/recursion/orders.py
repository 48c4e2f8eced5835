"""Orders and numbers of a bag's instances, for methods to which they matter.

K orders of a batch are rows (K, N) int64 on the host: in order k the instance in row
``orders[k, p]`` is at position p; every bag keeps its positions. An order depends on its bag alone:

- **permuted**: K permutations drawn from a fixed seed and the bag's size, so that a bag has the
  same ones in training, at evaluation and in any batch. NumPy promises not to change the
  generator's bits.
- **clustered**: the leaves of the single-link tree from left to right (`tree.leaf_order`).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.aggregators.recursion.tree import bag_vectors, leaf_order, single_link_tree
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of, resampled

SEED = 0x6F726472


def permuted_orders(offsets: Tensor, count: int) -> Tensor:
    """(K, N): ``count`` permutations of each bag, all equally likely.

    The first K of a larger ``count`` are the same.
    """
    bags = [start + permutations(end - start, count) for start, end in pairwise(offsets.tolist())]
    return torch.from_numpy(np.concatenate(bags, axis=1))


def clustered_orders(bags: RaggedBags) -> Tensor:
    """(1, N): each bag in the order of its tree's leaves.

    Raises:
        InputError: a value that is not finite.
    """
    orders = [
        start + leaf_order(vectors, single_link_tree(vectors))
        for start, vectors in zip(bags.offsets[:-1].tolist(), bag_vectors(bags), strict=True)
    ]
    return torch.from_numpy(np.concatenate(orders))[None]


def reordered(bags: RaggedBags, orders: Tensor) -> RaggedBags:
    """K B bags: all B in the first of K orders, then all in the second, and so on."""
    rows = orders.flatten().to(bags.values.device)
    sizes = bags.offsets.diff().repeat(len(orders))
    return RaggedBags(bags.values.index_select(0, rows), offsets_of(sizes))


def resized(bags: RaggedBags, fewest: int, most: int | None) -> RaggedBags:
    """Bags of at least ``fewest`` and at most ``most`` instances each.

    See `resampled`. Bags that fit stay as they are.
    """
    sizes = bags.offsets.diff()
    clamped = sizes.clamp(fewest, most)
    if torch.equal(clamped, sizes):
        return bags
    rows, offsets = resampled(bags.offsets, clamped)
    return RaggedBags(bags.values.index_select(0, rows.to(bags.values.device)), offsets)


@lru_cache(maxsize=256)
def permutations(size: int, count: int) -> NDArray[np.int64]:
    """(count, size): seeded orders of a bag of ``size`` instances."""
    keys = np.random.PCG64([SEED, size]).random_raw(count * size).reshape(count, size)
    return np.argsort(keys, axis=1, kind="stable").astype(np.int64)
