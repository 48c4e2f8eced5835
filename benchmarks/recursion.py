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
from dragn_cache.aggregators.dragn import Dragn
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of

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


def compare(name: str, kind: str, bags: RaggedBags, unit: str, **options: object) -> None:
    """Print a row: the loop, this project, and what it reads and computes in a second."""
    torch.manual_seed(0)
    dragn = create_aggregator("dragn", in_shape=bags.in_shape, unit=unit, **options)
    assert isinstance(dragn, Dragn)
    layers: list[nn.Module] = []
    for layer in dragn.unit:  # the same by PyTorch's own layers
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.Conv2d(3, layer.out_channels, 3, padding=1))
        else:
            layers.append(nn.BatchNorm2d(3) if isinstance(layer, nn.BatchNorm2d) else nn.ReLU())
    plain = nn.Sequential(*layers)
    plain.load_state_dict(dragn.unit.state_dict())
    slow, fast = interleaved(
        lambda: loop(bags, plain).sum().backward(), lambda: dragn(bags).embedding.sum().backward()
    )
    values = bags.values
    rate = 2 * values.numel() * values.element_size() / 1e6 / fast
    products = sum(27 * layer.out_channels for layer in plain if isinstance(layer, nn.Conv2d))
    windows = sum((n - 1) ** 2 // 4 for n in bags.offsets.diff().tolist())
    # An operation and its two gradients; what is computed again does not count.
    work = 3 * 2 * products * windows * values[0].numel() / 1e6 / fast
    print(
        f"{name:19} {kind:22} {slow:8.1f} {fast:8.2f}  {slow / fast:5.1f}×  {rate:6.1f}  "
        f"{work:8.1f}",
        flush=True,
    )


def main() -> None:
    machine()
    print("bags                unit, features             loop     ours   ratio   GB/s   GFLOP/s")
    for name, sizes in SIZES.items():
        offsets = offsets_of(torch.tensor(sizes))
        for shape, dtype in ((MAP, torch.float32), (MAP, torch.float16), (VECTOR, torch.float32)):
            values = torch.randn(sum(sizes), *shape).to(dtype)
            short = str(dtype).removeprefix("torch.float")
            kind = f"L1 {'×'.join(map(str, shape))} fp{short}"
            compare(name, kind, RaggedBags(values, offsets), "L1Agg")
        bags = RaggedBags(torch.randn(sum(sizes), *MAP), offsets)
        for unit in ("L2Agg", "L3Agg"):
            for bn in (True, False):
                kind = f"{unit[:2]}{', BN' if bn else ''}"
                compare(name, kind, bags, unit, bn=bn)


if __name__ == "__main__":
    main()
