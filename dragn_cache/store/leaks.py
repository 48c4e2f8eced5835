"""Bags of a store that may leak: with the same features, or with images in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dragn_cache.manifest import Bag
from dragn_cache.manifest.shared import find_shared, warn_shared
from dragn_cache.store.reader import Store
from dragn_cache.types import Warn


def warn_leaks(
    store: Store, bags: Sequence[Bag], warn: Warn, sides: Sequence[str] | None = None
) -> None:
    """Report bags that share features or images and need not stay on one side of a split.

    Images are known by the digests of their files, so copies count, and pictures saved anew do not.

    Args:
        bags: some of the store's.
        sides: their sides, where they are known; else those of one group stay together.
    """
    ids = [bag.bag_id for bag in bags]
    digests = np.ascontiguousarray(store.digests(ids)[:, :8]).view(np.uint64)[:, 0]
    filled = np.flatnonzero(store.sizes(ids))  # bags without instances are all alike
    same = find_shared(bags, filled, digests[filled], sides)
    warn_shared(bags, same, "features", warn, sides)
    told = {(pair.first, pair.other) for pair in same}
    images = find_shared(bags, *store.image_keys(ids), sides)
    images = [pair for pair in images if (pair.first, pair.other) not in told]
    warn_shared(bags, images, "images", warn, sides)
