"""Comparison of methods over paired folds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dragn_cache.scoring.intervals import COVERAGE_PERCENT


def mean_and_sd(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1) of what is defined; None where too few are."""
    defined = np.array([value for value in values if value is not None])
    mean = float(defined.mean()) if len(defined) else None
    return mean, float(defined.std(ddof=1)) if len(defined) > 1 else None


ROUNDING = 1e-12  # differences of scores that are no further apart are equal


def corrected_t_test(
    differences: NDArray[np.float64], test_to_train: float
) -> tuple[float | None, float | None, float | None]:
    """95 % interval of the mean difference, and the two-sided p of no difference.

    t = mean / sqrt((1 / n + n_test / n_train) s²), with n - 1 degrees of freedom.

    Args:
        differences: (n,) between two methods in the same tests.
        test_to_train: bags tested on over bags trained on.

    Returns:
        low, high, p; None with fewer than two differences; p is None where all are equal.
    """
    n = len(differences)
    if n < 2:
        return None, None, None
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) * (1 / n + test_to_train) ** 0.5
    if float(np.ptp(differences)) <= ROUNDING:
        return mean, mean, None
    reach = error * float(special.stdtrit(n - 1, 0.5 + COVERAGE_PERCENT / 200))
    return mean - reach, mean + reach, float(2 * special.stdtr(n - 1, -abs(mean) / error))
