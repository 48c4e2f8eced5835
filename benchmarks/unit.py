"""A unit's convolution as a matrix product against PyTorch's convolution, forward and backward.

    python benchmarks/unit.py

Prints milliseconds (median of 7, both in one process, interleaved) and their ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dragn_cache.aggregators.recursion.units import UnitConv

MAPS = 20480
REPEATS = 7


def timed(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return (time.perf_counter() - started) * 1e3


def measure(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    result: list[Tensor] = []
    forward = timed(lambda: result.append(layer(x)))
    total = result[0].sum()
    return forward, timed(total.backward)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {MAPS} maps of 3 inputs")
    print("map   outputs  convolution fwd/bwd  matrix fwd/bwd  ratio")
    for height, width in ((3, 3), (4, 10), (7, 7), (8, 8)):
        for outputs in (1, 3):
            matrix = UnitConv(3, outputs, 3, padding=1)
            plain = nn.Conv2d(3, outputs, 3, padding=1)
            x = torch.randn(MAPS, 3, height, width, requires_grad=True)
            for layer in (plain, matrix):
                measure(layer, x)
            pairs = [(measure(plain, x), measure(matrix, x)) for _ in range(REPEATS)]
            cells = [statistics.median(p[k][j] for p in pairs) for k in (0, 1) for j in (0, 1)]
            ratio = (cells[0] + cells[1]) / (cells[2] + cells[3])
            print(
                f"{height}×{width:<4} {outputs:^7}  {cells[0]:7.1f} / {cells[1]:7.1f}   "
                f"{cells[2]:6.1f} / {cells[3]:6.1f}  {ratio:5.1f}×"
            )


if __name__ == "__main__":
    main()
