"""MVCNN: the element-wise maximum over a bag's instances, after global average pooling of maps."""

from __future__ import annotations

from typing import ClassVar, Literal

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.bags import RaggedBags


class Max(Aggregator):
    """Embedding (B, C): the maximum over each bag's instances, channel by channel.

    From "Multi-view Convolutional Neural Networks" (Su et al., 2015), as the DRAGN paper compares
    with it. No parameters, no attention. Instances that tie for a maximum share its gradient
    evenly, as in ``Tensor.amax``.
    """

    needs: ClassVar[Literal["map", "vector", "any"]] = "any"
    order_sensitive: ClassVar[bool] = False

    @property
    def stackable(self) -> bool:
        return True

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        vectors = self.vectors(bags)
        # Ties are common: a dead channel is 0 in every instance. Starting from -inf keeps the
        # start out of them (from 0 with include_self=False it takes a share of the gradient), and
        # torch.segment_reduce does not divide a negative gradient among ties (torch 2.15).
        lowest = vectors.new_full((len(bags), self.out_dim), float("-inf"))
        rows = bags.segment_ids[:, None].expand_as(vectors)
        return Aggregated(lowest.scatter_reduce(0, rows, vectors, "amax"), None)
