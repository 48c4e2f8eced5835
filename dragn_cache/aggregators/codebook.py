"""Codebooks: a sample of training features and their k-means centres, the same in every run.

Nothing here touches the global generators, and sums are taken in one thread, so the same features
give the same centres however they come in batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from dragn_cache.errors import InputError

SEED = 0


def sample_rows(batches: Iterable[Tensor], count: int) -> Tensor:
    """(M, C) in batches → at most ``count`` rows, float32 on the CPU, in their order.

    Each set of rows is equally likely, and which are taken does not depend on where batches end.
    No more than a batch beside the sample is in memory.
    """
    # Each row draws a number; the rows with the smallest are the sample.
    generator = np.random.default_rng(SEED)
    drawn, kept = np.empty(0), torch.empty(0)
    for batch in batches:
        numbers = np.concatenate((drawn, generator.random(len(batch))))
        chosen = np.sort(np.argsort(numbers, kind="stable")[:count])
        old = torch.from_numpy(chosen[chosen < len(drawn)])
        new = torch.from_numpy(chosen[chosen >= len(drawn)] - len(drawn))
        fresh = batch[new.to(batch.device)].cpu().float()
        kept = torch.cat((kept[old], fresh)) if len(drawn) else fresh
        drawn = numbers[chosen]
    return kept


def train_centres(rows: Tensor, clusters: int, *, owner: str) -> Tensor:
    """(M, C) float32 on the CPU → (K, C): k-means centres from one k-means++ start.

    Args:
        owner: the method, for the error.

    Raises:
        InputError: fewer different rows than clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    error = InputError(
        f"aggregator {owner}, option clusters",
        expected="at most as many clusters as there are different training features",
        got=f"{clusters} for {len(rows)} features",
        remedy="give fewer",
    )
    if len(rows) < clusters:
        raise error
    # Several threads would add their shares in the order in which they finish.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            means = KMeans(clusters, n_init=1, max_iter=100, random_state=SEED).fit(rows.numpy())
        except ConvergenceWarning as warning:
            raise error from warning
    return torch.from_numpy(means.cluster_centers_)


def nearest_two(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(M, C) and (K, C), K ≥ 2 → (M,) twice: squared distances to the two nearest centres."""
    # The faster way, by a matrix product, loses the small distances in float32.
    distances = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")
    smallest = distances.topk(2, dim=1, largest=False).values.square()
    return smallest[:, 0], smallest[:, 1]
