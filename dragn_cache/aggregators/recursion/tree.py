"""Binary trees of bags by single-link clustering, and their merges level by level.

A tree is its merges (n - 1, 2) int64, as SciPy numbers them: node k < n is instance k of the bag,
node n + j is the result of merge j. A merge comes after those of its children, and the child with
the lower number is the first of the two.

- **Distances** are Euclidean, between instances averaged over h and w, in float64 whatever the
  features are, so that neither batch mates nor the order of the instances can change a tree by
  rounding. Distances that are equal are taken by index. No gradient goes through a tree.
- **A batch is merged level by level**: a merge is on the level after the higher one of its
  children, and all merges of a level, of all bags, are done at once. Levels are rounds of a
  recursion (`plan_levels`) whose results are further rows behind the instances', in C++
  (`compiled.fold`) as in PyTorch (`merge_levels`).
- **The order of the leaves** (`leaf_order`) does not depend on the order of the instances: of two
  children the one whose instances lie nearer to the bag's mean, on average, comes first.

A bag of n instances takes n² / 2 distances, so 4 n² bytes while its tree is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.aggregators.recursion.rounds import Round, Schedule
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


def tree_values(n: int) -> float:
    """The values, of 4 bytes, that `single_link_tree` takes for n instances."""
    return 1.25 * n**2


def tree_seconds(n: int, channels: int) -> float:
    """About the seconds that it takes: 1e-8, measured, for each two instances, and 5e-10 for each
    channel of them."""
    return (1e-8 + 5e-10 * channels) * n**2


def node_depths(merges: Merges) -> NDArray[np.int64]:
    """(2 n - 1,): the number of merges between each node of a tree and its root."""
    n = len(merges) + 1
    depths = np.zeros(2 * n - 1, np.int64)
    for made in range(len(merges) - 1, -1, -1):
        depths[merges[made]] = depths[n + made] + 1
    return depths


def leaf_order(vectors: NDArray[np.float64], merges: Merges) -> NDArray[np.int64]:
    """(n,): the leaves of the tree from left to right.

    Independent of the order of the instances, unless distances are equal.
    """
    n = len(vectors)
    totals = np.sqrt(((vectors - vectors.mean(0)) ** 2).sum(1)).tolist()
    counts = [1] * n
    for first, second in merges.tolist():
        totals.append(totals[first] + totals[second])
        counts.append(counts[first] + counts[second])
    order = []
    stack = [len(totals) - 1]
    while stack:
        node = stack.pop()
        if node < n:
            order.append(node)
            continue
        a, b = merges[node - n].tolist()
        nearer = totals[a] / counts[a] <= totals[b] / counts[b]
        stack += [b, a] if nearer else [a, b]
    return np.array(order, np.int64)


def plan_levels(trees: Sequence[Merges], *, both_orders: bool) -> Schedule:
    """The levels of a batch as rounds: the rows are the instances, then the levels' results.

    A merge is a window of two rows, or with ``both_orders`` two windows, one the other's mirror
    image. All bags leave before the last round, which merges nothing.
    """
    children, roots, levels = _number_nodes(trees)
    instances = len(levels) - len(children)
    merges = instances + levels[instances:].argsort(kind="stable")  # level by level
    row = np.arange(len(levels))  # of each node
    row[merges] = np.arange(instances, len(levels))
    none = torch.empty(0, dtype=torch.int64)
    rounds, first = [], instances
    for nodes in np.split(merges, levels[merges].searchsorted(np.arange(2, levels.max() + 1))):
        if len(nodes) == 0:  # no bag has two instances
            continue
        members = row[children[nodes - instances]]
        if both_orders:
            members = np.stack((members, members[:, ::-1]), 1).reshape(-1, 2)
        rounds.append(Round(none, none.view(0, 2), torch.from_numpy(members), none, first))
        first += len(nodes)
    root_rows = torch.from_numpy(row[roots, None].repeat(2, axis=1))
    rounds.append(Round(torch.arange(len(trees)), root_rows, none.view(0, 2), none))
    windows = [len(step.members) for step in rounds]
    return Schedule(rounds, windows, orders=2 if both_orders else 1, one_array=True)


def merge_levels(
    rounds: Sequence[Round], rows: Tensor, unit: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """(N, …) -> (B, …): every bag's root, by a ``unit`` of the level, (m, …), (m, …) -> (m, …).

    Args:
        rounds: those of `plan_levels` with each pair in one order.
    """
    # A node has one parent, so taken by itself its row is copied once, and once its gradient. From
    # whole arrays of rows, a tree that is a chain would read all rows again at every level.
    nodes = dict(enumerate(rows.unbind()))
    *levels, last = rounds
    for number, level in enumerate(levels):
        children = level.members.T.tolist()
        first, second = (torch.stack([nodes.pop(node) for node in side]) for side in children)
        merged = unit(number, first, second)
        nodes.update(enumerate(merged.unbind(), level.first_result))
    return torch.stack([nodes[root] for root in last.last_rows[:, 0].tolist()])


def _number_nodes(
    trees: Sequence[Merges],
) -> tuple[Merges, NDArray[np.int64], NDArray[np.int64]]:
    """Nodes numbered over the batch: 0 .. N - 1 are the instances, then come the merges, by bag.

    Returns:
        (M, 2) the children of all merges, (B,) each bag's root, (N + M,) each node's level, which
        is 0 for instances.
    """
    sizes = np.array([len(merges) + 1 for merges in trees])
    instances = int(sizes.sum())
    starts = sizes.cumsum() - sizes
    first_merges = instances + starts - np.arange(len(sizes))  # n instances have n - 1 merges
    renumbered = [
        np.where(merges < n, merges + start, merges - n + first_merge)
        for merges, n, start, first_merge in zip(trees, sizes, starts, first_merges, strict=True)
    ]
    children = np.concatenate(renumbered).reshape(-1, 2)
    roots = np.where(sizes == 1, starts, first_merges + sizes - 2)
    levels = [0] * instances
    for first, second in children.tolist():
        levels.append(1 + max(levels[first], levels[second]))
    return children, roots, np.array(levels, np.int64)
