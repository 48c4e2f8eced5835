"""An epoch of training on feature vectors beside torchmil's ABMIL with its own dataset and loader.

    python benchmarks/epoch.py

3000 bags of 1 to 15 vectors (512,), one label, batches of 32, forward, backward and AdamW, one
process, epochs in turn, median of 7. torchmil reads float32 .npy files once, before the clock
starts (``load_at_init``), and pads; here the bags are one array, float32 or float16. The ratio
is to torchmil's ABMIL, for ``gated_abmil`` to its gated one.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch comes

import numpy as np
import torch
from torchmil.data import collate_fn
from torchmil.datasets import ProcessedMILDataset
from torchmil.models import ABMIL

from dragn_cache.loading.feeds import Presentations
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import offsets_of
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.criteria import bce
from dragn_cache.training.model import build_model

BAGS, WIDTH, BATCH, REPEATS = 3000, 512, 32, 7
Epoch = Callable[[], float]


def draw() -> tuple[RaggedBags, torch.Tensor]:
    """Bags in float16, and targets (B, 1)."""
    generator = torch.Generator().manual_seed(0)
    offsets = offsets_of(torch.randint(1, 16, (BAGS,), generator=generator))
    values = torch.randn(int(offsets[-1]), WIDTH, generator=generator).relu().half()
    targets = torch.randint(0, 2, (BAGS, 1), generator=generator).float()
    return RaggedBags(values, offsets), targets


def ours(name: str, bags: RaggedBags, targets: torch.Tensor) -> Epoch:
    """The loop of ``dragn_cache.training.train``."""
    torch.manual_seed(0)
    config = TrainConfig(aggregator=name, batch_size=BATCH, dropout=0.0)
    model = build_model(config, bags.in_shape, 1).train()
    numbers = torch.arange(BAGS)
    feed = Presentations(bags, numbers[None], numbers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    generator = torch.Generator().manual_seed(0)

    def epoch() -> float:
        total = 0.0
        for batch, rows in feed.epoch(BATCH, generator):
            loss = bce(model(batch)[0], targets[rows])
            total += loss.item() * len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return total / BAGS

    return epoch


def write_torchmil(folder: Path, bags: RaggedBags, targets: torch.Tensor) -> None:
    """One file of features and one of labels per bag."""
    for name in ("features", "labels"):
        (folder / name).mkdir()
    for k in range(BAGS):
        np.save(folder / "features" / f"{k:05d}.npy", bags.bag(k).float().numpy())
        np.save(folder / "labels" / f"{k:05d}.npy", targets[k, 0].numpy())


def torchmils(folder: Path, *, gated: bool) -> Epoch:
    """ABMIL as torchmil's documentation trains it."""
    dataset = ProcessedMILDataset(
        features_path=str(folder / "features"),
        labels_path=str(folder / "labels"),
        bag_keys=["X", "Y"],
        load_at_init=True,
        verbose=False,
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, collate_fn=collate_fn
    )
    torch.manual_seed(0)
    model = ABMIL(in_shape=(WIDTH,), att_dim=128, gated=gated).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TrainConfig.lr)

    def epoch() -> float:
        total = 0.0
        for batch in loader:
            _, losses = model.compute_loss(batch["Y"], batch["X"], batch["mask"])
            loss = losses["BCEWithLogitsLoss"]
            total += loss.item() * len(batch["Y"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return total / BAGS

    return epoch


def main() -> None:
    bags, targets = draw()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; {BAGS} bags, "
        f"{len(bags.values)} instances, batches of {BATCH}, median of {REPEATS}"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_torchmil(Path(folder), bags, targets)
        epochs = {
            "torchmil abmil": torchmils(Path(folder), gated=False),
            "torchmil gated_abmil": torchmils(Path(folder), gated=True),
        }
        for name in ("abmil", "gated_abmil", "mean", "max"):
            for dtype in (torch.float32, torch.float16):
                epochs[f"{name} {dtype}"] = ours(name, bags.to(dtype=dtype), targets)
        for epoch in epochs.values():
            epoch()
        turns = [{name: seconds(epoch) for name, epoch in epochs.items()} for _ in range(REPEATS)]
    for name in epochs:
        took = statistics.median(turn[name] for turn in turns)
        theirs = "torchmil gated_abmil" if "gated" in name else "torchmil abmil"
        ratio = statistics.median(turn[theirs] / turn[name] for turn in turns)
        print(f"{name:28} {took * 1e3:7.1f} ms  {ratio:5.1f}×  loss {epochs[name]():.4f}")


def seconds(epoch: Epoch) -> float:
    started = time.perf_counter()
    epoch()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
