"""K models trained at once against one: a step (gather, forward, backward, AdamW) of each.

    python benchmarks/many.py

16 bags of 25 maps of 512×4×10 in fp32. Prints milliseconds a step (median of 7, all in one process,
interleaved) and the ratio to a single training's step; K single trainings would be a ratio of K.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch comes

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dragn_cache.aggregators.recursion.linear import pool_linearly
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.stacked import train_many
from dragn_cache.training.train import train

REPEATS = 7
STEPS = 3
METHODS: dict[str, dict[str, Any]] = {
    "L1Agg": {"options": {"unit": "L1Agg"}},
    "mean": {"aggregator": "mean"},
}


def make_data() -> LabelledBags:
    """16 bags to train on; one small one each to validate and test on costs next to nothing."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([25] * 16 + [1, 1])
    values = torch.rand(int(sizes.sum()), 512, 4, 10, generator=generator)
    targets = np.random.default_rng(0).integers(0, 2, (18, 10)).astype(np.int8)
    splits = ("train",) * 16 + ("validation", "test")
    return LabelledBags(RaggedBags(values, offsets_of(sizes)), targets, splits, "multilabel")


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def step_milliseconds(run: Callable[[int], object]) -> float:
    """A step: a longer training less a shorter one, so that neither start nor end count."""
    return (seconds(lambda: run(1 + STEPS)) - seconds(lambda: run(1))) / STEPS * 1e3


def recursion_alone(data: LabelledBags) -> None:
    """L1Agg's forward and backward pass on a batch that is there already."""
    bags = data.bags.first(16)

    def run(count: int) -> Callable[[], object]:
        weight = (torch.randn(count, 1, 3, 3, 3) / 9).requires_grad_()
        bias = torch.randn(count, 1, requires_grad=True)
        pool = torch.func.vmap(lambda w, b: pool_linearly(bags, w, b))
        if count == 1:
            return lambda: pool_linearly(bags, weight[0], bias[0]).sum().backward()
        return lambda: pool(weight, bias).sum().backward()

    runs = [run(count) for count in (1, 8, 64)]
    for step in runs:
        step()
    rounds = [[seconds(step) * 1e3 for step in runs] for _ in range(REPEATS)]
    one, *others = (statistics.median(column) for column in zip(*rounds, strict=True))
    cells = "  ".join(f"{ms:6.1f} {ms / one:5.2f}×" for ms in others)
    print(f"L1Agg, recursion alone: one {one:.1f}, K=8 and 64: {cells}")


def main() -> None:
    data = make_data()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, milliseconds a step")
    recursion_alone(data)
    print("method    single     K=1            K=8            K=64")
    for method, options in METHODS.items():
        base = TrainConfig(**options, shuffle_seed=0, batch_size=16)

        def single(epochs: int, base: TrainConfig = base) -> None:
            train(data, base.replace(epochs=epochs))

        def many(count: int, base: TrainConfig = base) -> Callable[[int], object]:
            rates = np.geomspace(1e-4, 1e-2, count).tolist()
            configs = [base.replace(lr=lr, seed=k) for k, lr in enumerate(rates)]
            return lambda epochs: train_many(data, [c.replace(epochs=epochs) for c in configs])

        runs = [single, many(1), many(8), many(64)]
        for run in runs:
            run(1)
        rounds = [[step_milliseconds(run) for run in runs] for _ in range(REPEATS)]
        one, *others = (statistics.median(column) for column in zip(*rounds, strict=True))
        cells = "  ".join(f"{ms:6.1f} {ms / one:5.2f}×" for ms in others)
        print(f"{method:8} {one:6.1f}  {cells}")


if __name__ == "__main__":
    main()
