"""Codebooks: a sample of training features and their k-means centres, the same in every run.

Nothing here touches the global generators, and sums are taken in one thread, so the same features
give the same centres however they come in batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

SAMPLE = 20_000  # rows for k-means, some seconds on one core
SEED = 0

Real = TypeVar("Real", np.float32, np.float64)


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


def train_centres(
    rows: NDArray[Real], count: int, *, seed: int, starts: int, most_steps: int
) -> tuple[NDArray[Real], int]:
    """Centres (count, C) of rows (M, C) by Lloyd's k-means, and how many of them have rows.

    Args:
        rows: at least ``count``; the centres are computed in their type.
        seed: below 2³².
        starts: k-means++ starts, of which the one with the smallest distances is kept.
        most_steps: of each start; centres that have not settled by then are used.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    # Several threads would add their shares in the order in which they finish.
    with threadpool_limits(1), warnings.catch_warnings():
        # Of centres without rows: the caller decides what they mean.
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(count, n_init=starts, max_iter=most_steps, random_state=seed).fit(rows)
    return means.cluster_centers_, len(np.unique(means.labels_))
