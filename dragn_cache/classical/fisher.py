"""Fisher vectors: gradients of a bag's likelihood by a Gaussian mixture's means and deviations.

With weights w, means μ and deviations σ (diagonal covariances) of a mixture fitted to the training
instances and γ_t(k) the posterior of component k for instance x_t, the part of component k in the
vector of a bag of n instances is (Perronnin and Dance, CVPR 2007; in the notation of Perronnin,
Sánchez and Mensink, ECCV 2010)::

    1 / (n √w_k)   Σ_t γ_t(k) (x_t − μ_k) / σ_k
    1 / (n √(2w_k)) Σ_t γ_t(k) [((x_t − μ_k) / σ_k)² − 1]

The gradient by the weights is left out, as in the second paper, which adds square roots and then
the L2 norm (``normalise = power``); ``none`` is the first paper's vector.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import numpy as np
from threadpoolctl import threadpool_limits

from dragn_cache.classical.base import (
    Arrays,
    WordMethod,
    normalised,
    seed_of,
    segment_sum,
)
from dragn_cache.classical.declared import FisherOptions
from dragn_cache.types import Floats, Ints

LEAST_VARIANCE = 1e-4  # added to each variance, as a share of the channels' mean variance
MOST_STEPS = 200  # of expectation maximisation; a mixture that has not converged by then is used


class FisherVectors(FisherOptions, WordMethod):
    """Gradients by means, then by deviations; E = 2·K·D."""

    name: ClassVar[str] = "fisher"

    def fit(self, instances: Floats, seed: int) -> Arrays:
        """``weights`` (K,), ``means`` (K, D) and ``deviations`` (K, D) of the mixture."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        mixture = GaussianMixture(
            self.count(instances),
            covariance_type="diag",
            reg_covar=LEAST_VARIANCE * float(instances.var(0).mean()) or LEAST_VARIANCE,
            max_iter=MOST_STEPS,
            random_state=seed_of(seed),
        )
        # One thread: several would sum a centre in an order that changes from run to run.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(instances)
        return {
            "weights": mixture.weights_,
            "means": mixture.means_,
            "deviations": np.sqrt(mixture.covariances_),
        }

    def encode(self, arrays: Arrays, instances: Floats, offsets: Ints) -> Floats:
        """(B, 2·K·D): K·D by the means, K·D by the deviations; see `ClassicalMethod.encode`."""
        gamma = posteriors(arrays, instances)
        sizes = np.diff(offsets)[:, None]
        by_mean, by_deviation = [], []
        for k, weight in enumerate(arrays["weights"]):
            away = (instances - arrays["means"][k]) / arrays["deviations"][k]
            part = segment_sum(gamma[:, k, None] * away, offsets)
            by_mean.append(part / (sizes * np.sqrt(weight)))
            part = segment_sum(gamma[:, k, None] * (away**2 - 1), offsets)
            by_deviation.append(part / (sizes * np.sqrt(2 * weight)))
        return normalised(np.hstack([*by_mean, *by_deviation]), self.normalise)


def posteriors(arrays: Arrays, instances: Floats) -> Floats:
    """(N, K): the probability of each component of the mixture for each instance (N, D)."""
    means, deviations = arrays["means"], arrays["deviations"]
    precision = deviations**-2
    squares = (
        instances**2 @ precision.T
        - 2 * instances @ (means * precision).T
        + (means**2 * precision).sum(1)
    )
    logs = np.log(arrays["weights"]) - np.log(deviations).sum(1) - squares / 2
    powers = np.exp(logs - logs.max(1, keepdims=True))
    result: Floats = powers / powers.sum(1, keepdims=True)
    return result
