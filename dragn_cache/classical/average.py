"""Transfer by a support vector machine: a bag is the mean of its instances' vectors.

The protocol of AAM's section 4.4: globally averaged features, normalised, an RBF machine for each
label, C and γ by cross-validation on the training bags, average precision for each label. In the
paper an example is one image; here it is the mean over a bag's images. The paper does not give the
normalisation: here it is ``l2``, or ``none`` together with `scale=standard`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dragn_cache.classical.base import Arrays, ClassicalMethod, normalised, segment_sum
from dragn_cache.classical.declared import AverageOptions
from dragn_cache.types import Floats, Ints


class Average(AverageOptions, ClassicalMethod):
    """The mean of a bag's instances; E = D."""

    name: ClassVar[str] = "svm"
    learns: ClassVar[bool] = False

    def fit(self, instances: Floats, seed: int) -> Arrays:
        """No arrays: a mean needs no training."""
        return {}

    def encode(self, arrays: Arrays, instances: Floats, offsets: Ints) -> Floats:
        """(B, D); see `ClassicalMethod.encode`."""
        means = segment_sum(instances, offsets) / np.diff(offsets)[:, None]
        return normalised(means, self.normalise)
