"""MI-mean: the average of a bag's instances, after global average pooling of maps."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.bags import RaggedBags


class Mean(Aggregator):
    """Embedding (B, C): the mean over each bag's instances (the DRAGN paper's MI-mean baseline).

    No parameters, no attention; the order of the instances matters to rounding only.
    """

    needs: ClassVar[Literal["map", "vector", "any"]] = "any"
    order_sensitive: ClassVar[bool] = False

    @property
    def stackable(self) -> bool:
        return True

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        vectors = self.vectors(bags)
        # segment_reduce adds each bag's rows in their order, on every device: index_add would use
        # atomics on a GPU, where the last bits then change from run to run.
        embedding = torch.segment_reduce(
            vectors, "mean", offsets=bags.offsets.to(vectors.device), axis=0, unsafe=True
        )
        return Aggregated(embedding, None)
