"""DRAGN's recursion, forward and backward, against the plain loop of Algorithm 1.

    python benchmarks/recursion.py

The loop takes one window of one bag at a time, as the authors' code does. Prints milliseconds
(median of 7, all in one process, interleaved) and the ratio; beside them the rate at which the
features are read (once forward, once backward), and what this machine copies and multiplies.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch comes

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dragn_cache.aggregators import create_aggregator
from dragn_cache.bags import RaggedBags, offsets_of

REPEATS = 7
MAP, VECTOR = (512, 4, 10), (512,)
# 32 bags like FlyExpress: mean 3.76, median 3, 15 of 32 with at most two.
DROSOPHILA = [1] * 7 + [2] * 8 + [3] * 7 + [4, 4, 5, 5, 6, 7, 8, 9, 10, 14]
SIZES = {"16 bags of 25": [25] * 16, "32 Drosophila bags": DROSOPHILA}


def milliseconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def interleaved(*steps: Callable[[], object]) -> list[float]:
    """Median of each step, after one run of each that does not count."""
    for step in steps:
        step()
    rounds = [[milliseconds(step) for step in steps] for _ in range(REPEATS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def loop(bags: RaggedBags, unit: nn.Module) -> Tensor:
    """Algorithm 1 and global average pooling, (B, C)."""
    embeddings = []
    for b in range(len(bags)):
        bag = bags.bag(b).float()
        o = list(bag if bag.dim() == 4 else bag[:, :, None, None])
        while len(o) > 2:
            windows = (torch.stack(o[j : j + 3], dim=1) for j in range(len(o) - 2))
            o = [unit(window)[:, 0] for window in windows]
        embeddings.append((o[0] if len(o) == 1 else (o[0] + o[1]) / 2).mean((1, 2)))
    return torch.stack(embeddings)


def machine() -> None:
    source = torch.randn(400, *MAP)
    target = torch.empty_like(source)
    square = torch.randn(1500, 1500)
    copy, product = interleaved(lambda: target.copy_(source), lambda: square @ square)
    gigabytes = 2 * source.numel() * 4 / 1e6 / copy
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"copy {gigabytes:.1f} GB/s, read and write; GEMM {2 * 1.5**3 / product * 1e3:.0f} GFLOP/s"
    )


def main() -> None:
    machine()
    print("bags                features          loop     ours   ratio   GB/s read")
    for name, sizes in SIZES.items():
        for shape, dtype in ((MAP, torch.float32), (MAP, torch.float16), (VECTOR, torch.float32)):
            torch.manual_seed(0)
            values = torch.randn(sum(sizes), *shape).to(dtype)
            bags = RaggedBags(values, offsets_of(torch.tensor(sizes)))
            dragn = create_aggregator("dragn", in_shape=shape, unit="L1Agg")
            plain = nn.Conv2d(3, 1, 3, padding=1)

            def reference(bags: RaggedBags = bags, plain: nn.Module = plain) -> None:
                loop(bags, plain).sum().backward()

            def ours(bags: RaggedBags = bags, dragn: nn.Module = dragn) -> None:
                dragn(bags).embedding.sum().backward()

            slow, fast = interleaved(reference, ours)
            rate = 2 * values.numel() * values.element_size() / 1e6 / fast
            kind = f"{'×'.join(map(str, shape))} {str(dtype).removeprefix('torch.float')}"
            print(f"{name:19} {kind:14} {slow:8.1f} {fast:8.2f}  {slow / fast:5.0f}×  {rate:6.1f}")


if __name__ == "__main__":
    main()
