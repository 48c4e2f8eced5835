"""Deep Sets: a network on each instance, a sum, mean or maximum, and a network on the result.

"Deep Sets" (Zaheer et al., 2017): a function of a set can be written ρ(Σ_k φ(h_k)), with φ and ρ
ReLU networks here. Maps are averaged over h and w first.

What differs. The theorem's pooling is the sum; the default is the mean. Bags differ 50 fold in
size: a sum grows with the bag and carries ρ out of the range that it was trained on, and a label is
seldom about the size. Take ``pool="sum"`` where the number of instances tells something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.layers import relu_network
from dragn_cache.old_options import check_choice
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_max, segment_mean, segment_sum

POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": segment_sum,
    "mean": segment_mean,
    "max": segment_max,
}


class DeepSets(Aggregator):
    """Embedding (B, D): ρ(pool over the bag of φ(h)); no attention.

    Args:
        in_shape: (C, h, w) or (C,).
        embed: widths of φ, one or several. Empty: φ(h) = h.
        pool: "sum", "mean" or "max", the last channel by channel.
        after: widths of ρ, one or several; the last is D. Empty: the classifier alone is ρ.
    """

    needs: ClassVar[Literal["map", "vector", "any"]] = "any"
    order_sensitive: bool = False

    def __init__(
        self,
        in_shape: Sequence[int],
        *,
        embed: int | Sequence[int] = 256,
        pool: Literal["sum", "mean", "max"] = "mean",
        after: int | Sequence[int] = 256,
    ) -> None:
        super().__init__(in_shape)
        check_choice("deepsets", "pool", pool, tuple(POOLS))
        self.pool = pool
        self.phi, width = relu_network("deepsets", "embed", self.out_dim, embed)
        self.rho, self.out_dim = relu_network("deepsets", "after", width, after)

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        pooled = POOLS[self.pool](self.phi(self.vectors(bags)), bags.offsets)
        return Aggregated(self.rho(pooled), None)
