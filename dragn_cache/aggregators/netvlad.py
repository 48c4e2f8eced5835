"""NetVLAD: for each of K clusters, how the instances near its centre lie around that centre.

"NetVLAD: CNN architecture for weakly supervised place recognition" (Arandjelović et al., 2016):
x is assigned to clusters by a_k(x) = softmax(w_kᵀ x + b_k), V_k = Σ a_k(x) (x − c_k) over the bag,
each V_k is scaled to length 1 (intra-normalisation), and so is the vector of all of them. Each x
has length 1 from the start, as in the authors' published networks.

- **Start.** ``fit`` finds the centres by k-means on the training bags and sets w_k = 2α c_k and
  b_k = −α |c_k|², which assigns by exp(−α |x − c_k|²). α is chosen as in the paper: the largest
  assignment is 100 times the second largest, on (geometric) average over the training instances.
  w, b and c are learned independently of each other from there. Without ``fit`` they are random.
- **What x is.** In the paper, the pixels of one image's map. Here the bag is the set: x is an
  instance, maps averaged first, so that the vector tells how instances differ; ``pixels=True``
  takes all pixels of all instances.
- **Reduction.** K·C numbers are many. The paper reduces them by PCA with whitening after
  training; ``reduce`` is a linear layer, learned with the rest, and length 1 after it.
- Instances that lie on their centre leave only rounding in V_k. So a mean residual shorter than
  1e-5 is not stretched to 1 but by 1e5, and a vector of such V_k only is not stretched at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import NetVladOptions
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.codebook import SAMPLE, SEED, sample_rows, train_centres
from dragn_cache.ragged.segments import segment_outer, segment_sum

SHORTEST = 1e-5
NOTHING = 1e-30
ASSIGNMENT_RATIO = 100.0
MOST_STEPS = 100  # of k-means


class NetVlad(Aggregator, declared="netvlad"):
    """Embedding (B, K·C), cluster by cluster, or (B, ``reduce``), rows of length 1. No attention.

    Args:
        in_shape: (C, h, w) or (C,).
        options: `NetVladOptions`.
    """

    options: NetVladOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        channels, clusters = self.in_shape[0], self.options.clusters
        self.assign = nn.Linear(channels, clusters)
        self.centres = nn.Parameter(F.normalize(torch.randn(clusters, channels)))
        self.out_dim = clusters * channels
        self.reduce = None
        if self.options.reduce is not None:
            self.reduce = nn.Linear(self.out_dim, self.options.reduce, bias=False)
            self.out_dim = self.options.reduce

    def row_values(self, *, training: bool) -> float:
        """Assignments and descriptors of each local feature, padded for their products."""
        pixels = math.prod(self.in_shape[1:]) if self.options.pixels else 1
        return pixels * (3 * self.options.clusters + 2 * self.in_shape[0])

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        x, offsets = self._local(bags)
        a = self.assign(x).softmax(1)
        total = segment_sum(a, offsets)[:, :, None]
        v = segment_outer(a, x, offsets) - total * self.centres
        # The mean residual has the direction of the sum, and rounding that does not grow with n.
        means = F.normalize(v / total.clamp_min(NOTHING), dim=2, eps=SHORTEST)
        # With one V_k of length 1, all of them are no shorter; what is shorter is rounding.
        vlad = F.normalize(means.flatten(1), eps=1.0)
        return Aggregated(vlad if self.reduce is None else F.normalize(self.reduce(vlad)), None)

    @torch.no_grad()
    def fit(self, batches: Iterable[RaggedBags]) -> None:
        """Start centres and assignment from k-means on a sample of all bags' instances.

        Raises:
            InputError: fewer different instances than clusters.
        """
        sample = sample_rows((self._local(bags)[0] for bags in batches), SAMPLE)
        centres = _start_centres(sample, len(self.centres))
        nearest, second = _nearest_two(sample, centres)
        alpha = math.log(ASSIGNMENT_RATIO) / float((second - nearest).mean())
        self.centres.copy_(centres)
        self.assign.weight.copy_(2 * alpha * centres)
        self.assign.bias.copy_(-alpha * centres.square().sum(1))

    def _local(self, bags: RaggedBags) -> tuple[Tensor, Tensor]:
        """The descriptors (M, C), of length 1, and the offsets of each bag's rows."""
        if not self.options.pixels:
            return F.normalize(self.vectors(bags)), bags.offsets
        maps = self.maps(bags).flatten(2)
        rows = maps.transpose(1, 2).flatten(0, 1)
        return F.normalize(rows), bags.offsets * maps.shape[2]


def _start_centres(rows: Tensor, clusters: int) -> Tensor:
    """(M, C) → (K, C): k-means centres from one k-means++ start."""
    error = InputError(
        "aggregator netvlad, option clusters",
        expected="at most as many clusters as there are different training features",
        got=f"{clusters} for {len(rows)} features",
        remedy="give fewer",
    )
    if len(rows) < clusters:
        raise error
    centres, with_rows = train_centres(
        rows.numpy(), clusters, seed=SEED, starts=1, most_steps=MOST_STEPS
    )
    if with_rows < clusters:
        raise error
    return torch.from_numpy(centres)


def _nearest_two(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(M, C) and (K, C), K ≥ 2 → (M,) twice: squared distances to the two nearest centres."""
    # The faster way, by a matrix product, loses the small distances in float32.
    distances = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")
    smallest = distances.topk(2, dim=1, largest=False).values.square()
    return smallest[:, 0], smallest[:, 1]
