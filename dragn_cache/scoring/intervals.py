"""Bootstrap intervals over bags."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dragn_cache.types import Floats

COVERAGE_PERCENT = 95.0
MIN_RESAMPLES = 20
# Resamples are drawn in chunks of at most this many weights (8 MB), whatever the number of bags.
CHUNK_WEIGHTS = 1_000_000


def bootstrap_counts(bags: int, count: int, seed: int) -> Iterator[Floats]:
    """Chunks (R, B) of how often each bag is in a resample of B bags drawn with replacement."""
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK_WEIGHTS // max(1, bags))
    for start in range(0, count if bags else 0, chunk):
        rows = min(chunk, count - start)
        numbers = rng.integers(bags, size=(rows, bags)) + bags * np.arange(rows)[:, None]
        counts = np.bincount(numbers.ravel(), minlength=rows * bags)
        yield counts.reshape(rows, bags).astype(np.float64)


def bootstrap_interval(draws: list[Floats]) -> list[float] | None:
    """The 95 % percentile interval ``[low, high]`` of draws; None where too few are defined."""
    values = np.concatenate(draws) if draws else np.empty(0)
    defined = values[~np.isnan(values)]
    if len(defined) < MIN_RESAMPLES:
        return None
    tail = (100 - COVERAGE_PERCENT) / 2
    return [float(value) for value in np.percentile(defined, [tail, 100 - tail])]
