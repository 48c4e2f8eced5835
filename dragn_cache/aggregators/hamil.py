"""HAMIL: instances merge two by two, the most similar first, by one small convolution.

"HAMIL: Hierarchical Aggregation-Based Multi-Instance Learning for Microscopy Image Classification"
(Tu, Lei, Long, Yang, arXiv 2103.09764), DRAGN's successor. Agglomerative clustering of a bag's
features (single link, Euclidean distances) gives a binary tree; in its order each merge replaces
two maps by one, u(x, y), with one unit for all channels and merges:

- ``L1Agg``: W * [x, y] + b
- ``L2Agg``: W' * f(g(W * [x, y] + b)) + b', f a ReLU, g batch normalisation, two hidden maps
- ``L3Agg``: one such stage more

Global average pooling comes after the last merge. A bag of one instance is that instance; two are
merged once. Where the paper leaves a choice, or this differs from it:

- **The kernel's size** is not in our sources: 3, as in DRAGN, unless ``kernel`` says otherwise.
- **Distances** are between averaged maps, and the tree is taken as given: no gradient through it.
- **Symmetry.** A convolution tells its two inputs apart, and a tree does not. By default a merge is
  ``(u(x, y) + u(y, x)) / 2``, so that the order of a bag's instances does not matter (unless
  distances are equal: see `tree`). Otherwise x is the node with the lower number.
- **The start.** DRAGN's "mean" start (hidden convolutions the identity, the last one an average)
  would be its own mirror image: with hidden maps and inputs both swapped nothing changes, so under
  a symmetric unit the gradients keep it so, and half of the parameters would repeat the other half
  for ever. The first hidden convolution therefore starts as ``[x, (x + y) / 2]``. Without BN and on
  non-negative features a merge still starts as exactly the mean of its two. L1Agg cannot be more
  than symmetric: it is linear, and its two kernels count by their sum.
- **Batch normalisation** is off unless asked for. In training it takes its statistics over all
  pairs of one level of the batch's trees, in both orders, and in evaluation the running statistics
  of that level, which is a merge's height above the instances. Statistics over a single value
  raise PyTorch's ValueError, "Expected more than 1 value per channel".
- **A symmetric L1Agg is linear**: a merge is one convolution of (x + y) / 2. So the embedding is a
  weighted sum over the features, like DRAGN's (see `chain`): an instance d merges below the root
  has the weights κ_d, which are the average over pixels through d halved, transposed convolutions,
  and a merge e below the root adds b sum(κ_e). The merges themselves are not computed.

On the CPU with a compiler the other units run in C++ (`compiled`, decision 0014): a level of trees
is a round of windows of two rows, under a symmetric unit both orders one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import HamilOptions
from dragn_cache.aggregators.recursion import compiled
from dragn_cache.aggregators.recursion.tree import (
    Merges,
    bag_vectors,
    merge_levels,
    node_depths,
    plan_levels,
    single_link_tree,
    tree_seconds,
    tree_values,
)
from dragn_cache.aggregators.recursion.units import (
    CONVOLUTIONS,
    DragnUnit,
    NormPass,
    UnitConv,
)
from dragn_cache.aggregators.recursion.weighted_sum import weighted_pool
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import owners


class Hamil(Aggregator, declared="hamil"):
    """Embedding (B, C): global average pooling of the tree's root. No attention.

    Args:
        in_shape: (C, h, w), or (C,) for vectors, which are maps of one pixel.
        options: `HamilOptions`.

    Raises:
        InputError: an option that is not allowed.
    """

    options: HamilOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        unit, init = self.options.unit, self.options.init
        self.symmetric = self.options.symmetric
        self.order_sensitive = not self.symmetric
        self.unit = DragnUnit(
            CONVOLUTIONS[unit],
            instances=2,
            channels=1,
            groups=1,
            kernel=self.options.kernel,
            bn=None if self.options.bn == "off" else "round",
            init=init,
        )
        if init == "mean" and self.symmetric and unit != "L1Agg":
            _separate_hidden_maps(self.unit.convolutions[0])

    def bag_values(self, n: int, *, training: bool) -> float:
        """Those of the tree, and of maps and hidden maps of instances and merges."""
        maps = math.prod(self.in_shape) * (2 if self.symmetric else 1)
        stages = len(self.unit.convolutions) - (1 if self.symmetric else 0)
        return tree_values(n) + n * maps * (2 + (9 if training else 1) * stages)

    def quadratic_seconds(self, n: int) -> float:
        return tree_seconds(n, self.in_shape[0])

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        trees = [single_link_tree(vectors) for vectors in bag_vectors(bags)]
        if self.symmetric and len(self.unit.convolutions) == 1:
            return Aggregated(self._pool_linearly(bags, trees), None)
        norms = NormPass("round")
        # A single value has no statistics: that error is PyTorch's.
        single = math.prod(self.in_shape) == 1 and any(norm.training for norm in self.unit.norms)
        if not single and compiled.applies(
            [self.unit], bags.values.device, vectors=bags.values.dim() == 2
        ):
            schedule = plan_levels(trees, both_orders=self.symmetric)
            pooled = compiled.fold(bags, [self.unit], schedule, norms)
        else:
            rounds = plan_levels(trees, both_orders=False).rounds
            roots = merge_levels(rounds, self.maps(bags), partial(self._merge, norms=norms))
            pooled = roots.mean((2, 3))
        norms.finish()
        return Aggregated(pooled, None)

    def _pool_linearly(self, bags: RaggedBags, trees: Sequence[Merges]) -> Tensor:
        """(B, C) of a linear unit, as one weighted sum over the features (see the module)."""
        conv = self.unit.convolutions[0]
        height, width = self.in_shape[1:] or (1, 1)
        depths = [node_depths(merges) for merges in trees]
        back = conv.weight.sum(1, keepdim=True).flip(2, 3) / 2
        kappas = [back.new_full((1, 1, height, width), 1 / (height * width))]
        for _ in range(max(int(depth.max()) for depth in depths)):
            kappas.append(F.conv2d(kappas[-1], back, padding=conv.padding))
        table = torch.cat(kappas).flatten(1)
        # Of a bag's 2 n - 1 nodes the first n are instances, the others merges.
        split = [np.split(depth, [len(depth) // 2 + 1]) for depth in depths]
        leaves, merged = (
            torch.from_numpy(np.concatenate(part)).to(table.device)
            for part in zip(*split, strict=True)
        )
        values = bags.values.reshape(len(bags.values), self.in_shape[0], -1)
        pooled = weighted_pool(values, table.index_select(0, leaves), bags.offsets)
        bag = owners(bags.offsets - torch.arange(len(bags) + 1)).to(table.device)
        sums = table.sum(1).index_select(0, merged)
        factors = table.new_zeros(len(bags)).index_add(0, bag, sums)
        return torch.addcmul(pooled, cast(Tensor, conv.bias), factors[:, None])

    def _merge(self, level: int, x: Tensor, y: Tensor, norms: NormPass) -> Tensor:
        """(m, C, h, w) twice -> (m, C, h, w): one level, counted from 0."""
        norms.start_round(level, torch.empty(0, dtype=torch.int64))
        pairs = torch.stack((x, y), dim=2)
        if self.symmetric:
            pairs = torch.cat((pairs, pairs.flip(2)))
        merged: Tensor = self.unit(pairs.flatten(0, 1), norms)
        orders = merged.view(-1, *x.shape)
        return orders.mean(0)


@torch.no_grad()
def _separate_hidden_maps(conv: UnitConv) -> None:
    """Turn the start [x, y] into [x, (x + y) / 2]; see the module."""
    centre = conv.kernel_size[0] // 2
    conv.weight[1, :, centre, centre] = 0.5
