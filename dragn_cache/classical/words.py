"""Bag of visual words and VLAD: an instance counts for its nearest word of a k-means codebook.

- **Bag of visual words** (Csurka et al., 2004; Yang et al., 2007): entry k of a bag's vector is the
  share of its instances that are nearest to word k.
- **VLAD** (Jégou et al., CVPR 2010): part k is ``Σ_t (x_t − c_k)`` over the instances nearest to
  word c_k, the bag's K parts then normalised together (``l2``), after square roots (``power``,
  Jégou et al., PAMI 2012) or after each part by itself (``intra``, Arandjelović and Zisserman,
  CVPR 2013).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dragn_cache.classical.base import Arrays, WordMethod, normalised, owners, seed_of
from dragn_cache.classical.declared import BagOfWordsOptions, VladOptions
from dragn_cache.ragged.codebook import train_centres
from dragn_cache.types import Floats, Ints

STARTS = 3  # of k-means
MOST_STEPS = 300


class BagOfWords(BagOfWordsOptions, WordMethod):
    """Counts of each word in a bag; E = K."""

    name: ClassVar[str] = "bovw"

    def fit(self, instances: Floats, seed: int) -> Arrays:
        """``words`` (K, D): the centres that k-means finds."""
        return _words(instances, self.count(instances), seed)

    def encode(self, arrays: Arrays, instances: Floats, offsets: Ints) -> Floats:
        """(B, K); see `ClassicalMethod.encode`."""
        words, bags = arrays["words"], len(offsets) - 1
        cell = owners(offsets) * len(words) + nearest(instances, words)
        counts = np.bincount(cell, minlength=bags * len(words)).astype(np.float64)
        return normalised(counts.reshape(bags, len(words)), self.normalise)


class Vlad(VladOptions, WordMethod):
    """Sums of the differences between instances and their words; E = K·D."""

    name: ClassVar[str] = "vlad"

    def fit(self, instances: Floats, seed: int) -> Arrays:
        """``words`` (K, D): the centres that k-means finds."""
        return _words(instances, self.count(instances), seed)

    def encode(self, arrays: Arrays, instances: Floats, offsets: Ints) -> Floats:
        """(B, K·D), word after word; see `ClassicalMethod.encode`."""
        words, bags = arrays["words"], len(offsets) - 1
        assigned = nearest(instances, words)
        cell = owners(offsets) * len(words) + assigned
        order = np.argsort(cell, kind="stable")
        cells, starts = np.unique(cell[order], return_index=True)
        sums = np.zeros((bags * len(words), words.shape[1]))
        sums[cells] = np.add.reduceat((instances - words[assigned])[order], starts, axis=0)
        return normalised(sums.reshape(bags, *words.shape), self.normalise)


def _words(instances: Floats, count: int, seed: int) -> Arrays:
    """``words`` (count, D). Instances that differ by rounding alone may share one."""
    centres, _ = train_centres(
        instances, count, seed=seed_of(seed), starts=STARTS, most_steps=MOST_STEPS
    )
    return {"words": centres}


def nearest(instances: Floats, words: Floats) -> Ints:
    """(N,): the word (K, D) nearest to each instance (N, D), the first if tied."""
    distances = (words**2).sum(1) - 2 * (instances @ words.T)  # less ‖x‖², the same for all words
    numbers: Ints = distances.argmin(1)
    return numbers
