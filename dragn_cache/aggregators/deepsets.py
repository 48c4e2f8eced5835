"""Deep Sets: a network on each instance, a sum, mean or maximum, and a network on the result.

"Deep Sets" (Zaheer et al., 2017): a function of a set can be written ρ(Σ_k φ(h_k)), with φ and ρ
ReLU networks here. Maps are averaged over h and w first.

What differs. The theorem's pooling is the sum; the default is the mean. Bags differ 50 fold in
size: a sum grows with the bag and carries ρ out of the range that it was trained on, and a label is
seldom about the size. Take ``pool="sum"`` where the number of instances tells something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import DeepSetsOptions
from dragn_cache.aggregators.layers import in_blocks, relu_network
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_max, segment_mean, segment_sum

POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": segment_sum,
    "mean": segment_mean,
    "max": segment_max,
}


class DeepSets(Aggregator, declared="deepsets"):
    """Embedding (B, D): ρ(pool over the bag of φ(h)); no attention.

    Args:
        in_shape: (C, h, w) or (C,).
        options: `DeepSetsOptions`.
    """

    options: DeepSetsOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        self.phi, width = relu_network(self.out_dim, self.options.embed)
        self.rho, self.out_dim = relu_network(width, self.options.after)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        pooled = POOLS[self.options.pool](in_blocks(self.phi, self.vectors(bags)), bags.offsets)
        return Aggregated(self.rho(pooled), None)
