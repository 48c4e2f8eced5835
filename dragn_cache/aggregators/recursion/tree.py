"""Binary trees of bags by single-link clustering: who merges with whom, and in what order.

A tree is its merges (n - 1, 2) int64, as SciPy numbers them: node k < n is instance k of the bag,
node n + j is what merge j made; a merge comes after those of its children, and of its two children
the one with the lower number is first.

- **Distances** are Euclidean, between instances averaged over h and w, in float64 whatever the
  features are, so that neither batch mates nor the order of the instances can change a tree by
  rounding. Distances that are equal are taken by index. No gradient goes through a tree.
- **A batch is merged level by level**: a merge is on the level after the higher one of its
  children, and all merges of a level, of all bags, are done at once. Levels are rounds of a
  recursion (`plan_levels`) whose results are further rows behind the instances', in C++
  (`compiled.fold`) as in PyTorch (`merge_levels`).
- **The order of the leaves** (`leaf_order`) is the tree's where no row of instances can tell left
  from right: the child whose instances lie nearer to the bag's mean, on average, comes first.

A bag of n instances takes n² / 2 distances, so 4 n² bytes while its tree is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.aggregators.recursion.rounds import Round
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import averaged

Merges = NDArray[np.int64]


def bag_vectors(bags: RaggedBags) -> list[NDArray[np.float64]]:
    """The instances (n, C) of each bag, averaged over h and w, on the host.

    Raises:
        InputError: a value that is not finite, which has no distance to others.
    """
    values = bags.values.detach()
    if values.dim() == 4:
        values = averaged(values, torch.float64)
    vectors = values.double().cpu().numpy()
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
        bag = int(np.searchsorted(bags.offsets.numpy(), row, side="right")) - 1
        raise InputError(
            f"clustering, bag {bag} of the batch, instance {row - int(bags.offsets[bag])}",
            expected="finite features",
            got="a value that is not",
            remedy="extract that bag again, or leave it out",
        )
    return [vectors[start:end] for start, end in pairwise(bags.offsets.tolist())]


def single_link_tree(vectors: NDArray[np.float64]) -> Merges:
    """The merges (n - 1, 2) of instances (n, C), n at least 1."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import pdist

    if len(vectors) < 3:  # nothing to choose
        return np.array([[0, 1]], np.int64)[: len(vectors) - 1]
    merges: Merges = np.sort(linkage(pdist(vectors), "single")[:, :2].astype(np.int64), axis=1)
    return merges


def node_depths(merges: Merges) -> NDArray[np.int64]:
    """(2 n - 1,): how many merges lie between each node of a tree and its root."""
    n = len(merges) + 1
    depths = np.zeros(2 * n - 1, np.int64)
    for made in range(len(merges) - 1, -1, -1):
        depths[merges[made]] = depths[n + made] + 1
    return depths


def leaf_order(vectors: NDArray[np.float64], merges: Merges) -> NDArray[np.int64]:
    """(n,): the instances as the tree has them from left to right.

    It does not depend on the order in which the instances are given, unless distances are equal.
    """
    n = len(vectors)
    totals = np.sqrt(((vectors - vectors.mean(0)) ** 2).sum(1)).tolist()
    counts = [1] * n
    for first, second in merges.tolist():
        totals.append(totals[first] + totals[second])
        counts.append(counts[first] + counts[second])
    order = []
    waiting = [len(totals) - 1]
    while waiting:
        node = waiting.pop()
        if node < n:
            order.append(node)
            continue
        a, b = merges[node - n].tolist()
        nearer = totals[a] / counts[a] <= totals[b] / counts[b]
        waiting += [b, a] if nearer else [a, b]
    return np.array(order, np.int64)


def plan_levels(trees: Sequence[Merges], *, both_orders: bool) -> list[Round]:
    """The levels of a batch as rounds: first the instances' rows, then what the levels merge.

    A merge is a window of two rows, or with ``both_orders`` two windows, one the other's mirror
    image. All bags leave before the last round, which merges nothing.
    """
    children, roots, level = _joined(trees)
    rows = len(level) - len(children)
    made = rows + level[rows:].argsort(kind="stable")  # the merges by level
    row = np.concatenate((np.arange(rows), np.empty(len(made), np.int64)))
    row[made] = np.arange(rows, rows + len(made))
    none, ends = torch.empty(0, dtype=torch.int64), row[roots, None].repeat(2, axis=1)
    rounds, first = [], rows
    for nodes in np.split(made, level[made].searchsorted(np.arange(2, level.max() + 1))):
        members = row[children[nodes - rows]]
        if both_orders:
            members = np.stack((members, members[:, ::-1]), 1).reshape(-1, 2)
        rounds.append(Round(none, none.view(0, 2), torch.from_numpy(members), none, first))
        first += len(nodes)
    everyone = torch.arange(len(trees))
    last = Round(everyone, torch.from_numpy(ends), none.view(0, 2), none)
    return [*(step for step in rounds if len(step.members)), last]


def merge_levels(
    rounds: Sequence[Round], rows: Tensor, unit: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """(N, …) -> (B, …): every bag's root, by a ``unit`` (m, …), (m, …) -> (m, …).

    Args:
        rounds: `plan_levels` with each pair in one order.
    """
    # Each node has one parent. Taken one by one, its row is copied once, into its parent's level,
    # and is let go there; arrays of rows would be read, or their gradients added up, again and
    # again in trees that are chains.
    nodes = dict(enumerate(rows.unbind()))
    *levels, last = rounds
    for level in levels:
        children = level.members.T.tolist()
        first, second = (torch.stack([nodes.pop(node) for node in side]) for side in children)
        nodes.update(enumerate(unit(first, second).unbind(), level.first))
    return torch.stack([nodes[root] for root in last.ends[:, 0].tolist()])


def _joined(
    trees: Sequence[Merges],
) -> tuple[Merges, NDArray[np.int64], NDArray[np.int64]]:
    """The children of all merges, each bag's root, and each node's level, 0 for instances.

    Nodes are numbered over the batch: 0 .. N - 1 are the instances, the others the merges, bag
    after bag.
    """
    sizes = np.array([len(merges) + 1 for merges in trees])
    rows = int(sizes.sum())
    ends = sizes.cumsum()
    starts = ends - sizes
    made_before = rows + starts - np.arange(len(sizes))  # a bag of n instances has n - 1 merges
    renumbered = [
        np.where(merges < n, merges + start, merges - n + made)
        for merges, n, start, made in zip(trees, sizes, starts, made_before, strict=True)
    ]
    children = np.concatenate(renumbered).reshape(-1, 2)
    roots = np.where(sizes == 1, starts, made_before + sizes - 2)
    level = [0] * rows
    for a, b in children.tolist():
        level.append(1 + max(level[a], level[b]))
    return children, roots, np.array(level, np.int64)
