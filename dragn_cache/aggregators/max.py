"""MVCNN: the element-wise maximum over a bag's instances, after global average pooling of maps."""

from __future__ import annotations

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_max


class Max(Aggregator, declared="max"):
    """Embedding (B, C): the maximum over each bag's instances, channel by channel.

    This is ``mvcnn`` by another name: "Multi-view Convolutional Neural Networks" (Su et al.,
    2015), as the DRAGN paper compares with it. No parameters, no attention. Instances that tie for
    a maximum share its gradient evenly, as in ``Tensor.amax``.
    """

    @property
    def stackable(self) -> bool:
        return True

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        return Aggregated(segment_max(self.vectors(bags), bags.offsets), None)
