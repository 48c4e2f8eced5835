"""Codebooks: a sample of training features and their k-means centres, the same in every run.

The global random generators are not used, and sums are taken in one thread, so the same features
give the same centres, in whatever batches they are read.
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

    Each set of rows is equally likely, and the sample does not depend on where batches end. Only
    the sample and one batch are in memory.
    """
    # Each row gets a random number; the rows with the smallest numbers are the sample.
    generator = np.random.default_rng(SEED)
    sample_numbers, sample = np.empty(0), torch.empty(0)
    for batch in batches:
        numbers = np.concatenate((sample_numbers, generator.random(len(batch))))
        chosen = np.sort(np.argsort(numbers, kind="stable")[:count])
        old = torch.from_numpy(chosen[chosen < len(sample_numbers)])
        new = torch.from_numpy(chosen[chosen >= len(sample_numbers)] - len(sample_numbers))
        fresh = batch[new.to(batch.device)].cpu().float()
        sample = torch.cat((sample[old], fresh)) if len(sample_numbers) else fresh
        sample_numbers = numbers[chosen]
    return sample


def train_centres(
    rows: NDArray[Real], count: int, *, seed: int, starts: int, most_steps: int
) -> tuple[NDArray[Real], int]:
    """Centres (count, C) of rows (M, C) by Lloyd's k-means, and how many of them have rows.

    Args:
        rows: at least ``count``; the centres are computed in their type.
        seed: below 2³².
        starts: k-means++ starts, of which the one with the smallest distances is kept.
        most_steps: of each start; centres that have not converged by then are used.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    # Several threads add their sums in the order in which they finish, which changes last bits.
    with threadpool_limits(1), warnings.catch_warnings():
        # It warns of centres without rows; the caller gets their number and decides.
        warnings.simplefilter("ignore", ConvergenceWarning)
        means = KMeans(count, n_init=starts, max_iter=most_steps, random_state=seed).fit(rows)
    return means.cluster_centers_, len(np.unique(means.labels_))
