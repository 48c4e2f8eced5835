"""MI-mean: the average of a bag's instances, after global average pooling of maps."""

from __future__ import annotations

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_mean


class Mean(Aggregator, declared="mean"):
    """Embedding (B, C): the mean over each bag's instances (the DRAGN paper's MI-mean baseline).

    No parameters, no attention; the order of the instances matters to rounding only.
    """

    @property
    def stackable(self) -> bool:
        return True

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return Aggregated(segment_mean(self.vectors(bags), bags.offsets), None)
