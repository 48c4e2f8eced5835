"""HAMIL, forward and backward, against a plain loop that merges two maps at a time.

    python benchmarks/hamil.py

Both are given the features in half precision, as stores have them, and grow the trees. Prints
milliseconds (median of 7, in one process, interleaved) and the ratio.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch comes

import torch
from recursion import DROSOPHILA, interleaved
from torch import Tensor

from dragn_cache.aggregators import create_aggregator
from dragn_cache.aggregators.hamil import Hamil
from dragn_cache.aggregators.recursion.tree import bag_vectors, single_link_tree
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of

CASES = {
    "16 bags of 9, 1280×7×7": ([9] * 16, (1280, 7, 7)),
    "32 Drosophila bags, 1280×3×6": (DROSOPHILA, (1280, 3, 6)),
}


def loop(bags: RaggedBags, hamil: Hamil) -> Tensor:
    """(B, C): one merge at a time, the unit on both orders of its two."""
    embeddings = []
    for k, vectors in enumerate(bag_vectors(bags)):
        maps = list(bags.bag(k).float())
        for a, b in single_link_tree(vectors):
            x, y = maps[a], maps[b]
            both = (hamil.unit(torch.stack(pair, 1)) for pair in ((x, y), (y, x)))
            maps.append(torch.stack(list(both)).mean(0)[:, 0])
        embeddings.append(maps[-1].mean((1, 2)))
    return torch.stack(embeddings)


def compare(name: str, bags: RaggedBags, unit: str) -> None:
    """Print a row: the loop, this project, and the ratio."""
    torch.manual_seed(0)
    hamil = create_aggregator("hamil", in_shape=bags.in_shape, unit=unit)
    assert isinstance(hamil, Hamil)
    slow, fast = interleaved(
        lambda: loop(bags, hamil).sum().backward(), lambda: hamil(bags).embedding.sum().backward()
    )
    print(f"{name:29} {unit}  {slow:8.1f} {fast:8.2f}  {slow / fast:5.1f}×", flush=True)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("bags                          unit       loop     ours   ratio")
    for name, (sizes, shape) in CASES.items():
        values = torch.randn(sum(sizes), *shape).half()
        for unit in ("L1Agg", "L2Agg", "L3Agg"):
            compare(name, RaggedBags(values, offsets_of(torch.tensor(sizes))), unit)


if __name__ == "__main__":
    main()
