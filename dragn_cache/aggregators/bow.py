"""Learnable bag of words: how often each of K words occurs in a bag, softly counted.

The aggregation of AAM, the Attentional Aggregation Module (section 3.2, equations 10 and 11): a
local feature x is assigned to K words by softmax(w_kᵀ x + b_k), all assignments are summed up and
the histogram is scaled to length 1. K = 64. Words are learned with the classifier, from a random
start.

The paper sums over the H×W features of one image; here the sum runs over all instances of a bag as
well. Vectors are maps of one pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import BowOptions
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_sum


class Bow(Aggregator, declared="bow"):
    """Embedding (B, K), not negative, each row of length 1. No attention.

    Args:
        in_shape: (C, h, w) or (C,).
        options: `BowOptions`.
    """

    options: BowOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        self.assign = nn.Linear(self.out_dim, self.options.clusters)
        self.out_dim = self.options.clusters

    def row_values(self, *, training: bool) -> float:
        """Words of each pixel."""
        return math.prod(self.in_shape[1:]) * super().row_values(training=training)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        pixels = self.maps(bags).flatten(2)
        scores = self.assign.weight @ pixels + self.assign.bias[:, None]
        histograms = segment_sum(scores.softmax(1).sum(2), bags.offsets)
        return Aggregated(F.normalize(histograms), None)
