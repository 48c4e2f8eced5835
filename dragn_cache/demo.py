"""A demonstration on simulated images: simulate, check, extract, train three methods, compare."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dragn_cache.backbone_input import size_text
from dragn_cache.datasets.config import DemoConfig
from dragn_cache.datasets.simulated import simulate
from dragn_cache.extraction.check import check_dataset
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.extract import extract
from dragn_cache.figures.comparison import plot_comparison
from dragn_cache.files import write_bytes, write_text
from dragn_cache.manifest import Manifest, read_manifest
from dragn_cache.runs.train import train_run
from dragn_cache.store import open_store
from dragn_cache.training.config import TrainConfig

Bar = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]
Announce = Callable[[str, Path | None, Mapping[str, object]], None]

# A random network's features differ little between images; methods learn from them if standardised.
METHODS: dict[str, TrainConfig] = {
    "L3Agg": TrainConfig(aggregator="dragn", options={"unit": "L3Agg"}, scale="standard", lr=1e-3),
    "mean": TrainConfig(aggregator="mean", scale="standard", lr=1e-3),
    "max": TrainConfig(aggregator="max", scale="standard", lr=1e-3),
}


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo: each method's metrics and seconds, and the figure."""

    metrics: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    figure: Path


def run_demo(out: Path, config: DemoConfig, *, announce: Announce, bar: Bar) -> DemoResult:
    """Simulate, check, extract and train in ``out``; a second run reuses images and features.

    Args:
        announce: called with the command that does each step: its name, the folder that it takes
            or None, and its settings.
        bar: makes a progress bar from a title and a unit.
    """
    data, features = out / "simulated", out / "simulated.features"
    is_demo = (features / "store.json").is_file()  # else what is in runs/ is somebody else's
    drawn = {"bags": config.bags, "seed": config.seed, "size": size_text(config.size)}
    announce("simulate", None, {"out": data, **drawn})
    with bar("simulating", "bags") as progress:
        simulate(data, config, progress=lambda done: progress(done, config.bags))
    announce("check", data, {})
    with bar("checking", "images") as progress:
        faults = check_dataset(data, progress=progress).faults
    if faults:
        raise faults[0].error(len(faults) - 1)
    network: dict[str, Any] = {"backbone": "resnet18", "weights": "random"}
    announce("extract", None, {"dataset": data, **network, "out": features})
    manifest = read_manifest(data)
    with bar("extracting", "images") as progress:
        extract(manifest, ExtractConfig(**network), features, progress=progress)
    for method in METHODS if is_demo else ():
        shutil.rmtree(out / "runs" / method, ignore_errors=True)
    return _train(out, features, manifest, announce, bar)


def _train(
    out: Path,
    features: Path,
    manifest: Manifest,
    announce: Announce,
    bar: Bar,
) -> DemoResult:
    metrics, seconds, histories = {}, {}, {}
    store = open_store(features)
    for method, config in METHODS.items():
        run = out / "runs" / method
        how = {"unit": method} if config.aggregator == "dragn" else {"aggregator": method}
        settings = {"store": features, **how, "scale": config.scale, "lr": config.lr, "out": run}
        announce("train-agg", None, settings)
        started = time.perf_counter()
        with bar(f"training {method}", "epochs") as progress:
            metrics[method] = train_run(
                store,
                config,
                run,
                progress=partial(_count, progress, config.epochs),
            )
        seconds[method] = time.perf_counter() - started
        with (run / "history.csv").open() as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        histories[method] = rows
    figure = out / "demo.png"
    bag = next(b for b in manifest.bags if 6 <= len(manifest.instances[b.bag_id]) <= 9)
    picture = io.BytesIO()
    plot_comparison(
        picture,
        metrics=metrics,
        histories=histories,
        bag=[_merged(manifest, row.image) for row in manifest.instances[bag.bag_id]],
        bag_title=f"bag {bag.bag_id}: {', '.join(bag.labels or ())}",
    )
    write_bytes(figure, picture.getvalue())
    write_text(out / "demo.json", json.dumps(metrics, indent=2) + "\n")
    return DemoResult(metrics, seconds, figure)


def _count(update: Callable[[int, int], None], epochs: int, row: dict[str, float]) -> None:
    update(int(row["epoch"]), epochs)


def _merged(manifest: Manifest, image: str) -> NDArray[np.uint8]:
    """(H, W, 3): the three channels as colours."""
    files = [manifest.image_root / image.replace("{channel}", c) for c in ("red", "green", "blue")]
    return np.stack([np.asarray(Image.open(file)) for file in files], axis=-1)
