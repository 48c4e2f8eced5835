"""Data of version 1 in ``v1/``, which ``tests/test_older_versions.py`` reads with later code.

Written by commit ec97b68 (version 0.1.0: store schema 2, checkpoint 1). The suite does not run this
script, and it need not work with later code: files of an old version are of use only as they are.
To make them again, check that commit out, put this file there and run

    PYTHONPATH=.:cli python tests/data/make_v1.py

What it writes, from one seed:

    expected/layer4.npy, gap.npy, view1.npy, offsets.npy   the stores' values, as NumPy wrote them
    hdf5.features, zarr.features                           float32; float16 with a second view
    dragn, abmil, svm                                      runs on hdf5.features
    crossval                                               three methods, three folds, one seed
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"  # the same sums on any number of cores

import numpy as np
from dragn_cache_cli.app import app
from numpy.typing import NDArray

from dragn_cache.manifest import Bag, Instance, Manifest
from dragn_cache.store import (
    Failure,
    InstanceRecord,
    StoreDescription,
    Tap,
    open_writer,
    plan_parts,
)

Format = Literal["hdf5", "zarr"]
DType = Literal["float16", "float32"]
LABELS = ("actin", "golgi", "nucleus")
SHAPE = (5, 2, 3)
BAGS, PART_INSTANCES = 31, 71
UNUSABLE = 7  # the bag without a usable input

# As an extraction records them, but for the digests of weights that nobody has.
FEATURES = {
    "backbone": "resnet18",
    "weights_sha256": "00ff" * 16,
    "taps": ["layer4", "gap"],
    "grid": None,
    "preprocessing": {
        "channels": "rgb",
        "intensity": "full",
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "resize_shorter": None,
        "rgb": None,
        "size": [64, 96],
        "std": [0.229, 0.224, 0.225],
    },
}
FLIPPED = {"seed": 0, "steps": ["flip"], "views": 1}
NUMERICS = {
    "autocast": None,
    "batch_size": 4,
    "compute": "eager",
    "device": "cpu",
    "memory_format": "channels_last",
    "torch": "2.15.0",
}

TRAINING = "--epochs 13 --batch-size 5 --intervals 50"
COMMANDS = (
    f"train-agg --store hdf5.features --out dragn --unit L3Agg --lr 0.003 {TRAINING}",
    "train-agg --store hdf5.features --out abmil --aggregator abmil --option embed=11,7 "
    "--option attn_dim=5 --loss focal --loss-option gamma=1.5 --schedule cosine --optimizer sgd "
    f"--lr 0.3 --scale standard --decision thresholds --seed 3 {TRAINING}",
    "train-agg --store hdf5.features --out svm --aggregator svm --intervals 50",
    "crossval --store hdf5.features --out crossval --aggregator abmil[embed=7],dragn[unit=L3Agg] "
    f"--aggregator vlad[words=2] --folds 3 --seeds 1 --jobs 1 {TRAINING}",
)

Values = NDArray[np.float32]


def make_bags(rng: np.random.Generator) -> tuple[list[Bag], list[Values]]:
    """Bags in groups of two, and their maps (n, C, h, w): a bag's labels brighten a channel."""
    bags, maps = [], []
    for k in range(BAGS):
        labels = tuple(label for label in LABELS if rng.random() < 0.5)
        bags.append(Bag(f"{k:03d}", labels, group=f"g{k // 2}"))
        n = 0 if k == UNUSABLE else int(rng.integers(1, 8))
        values = rng.uniform(0, 1, (n, *SHAPE))
        for label in labels:
            values[:, LABELS.index(label)] += 1.5
        maps.append(values.astype(np.float32))
    return bags, maps


def write_store(
    path: Path, format: Format, dtype: DType, bags: list[Bag], views: dict[str, list[Values]]
) -> None:
    """A store of two taps, ``layer4`` and its mean ``gap``, in several parts."""
    taps = (Tap("layer4", SHAPE, dtype), Tap("gap", SHAPE[:1], dtype))
    provenance: dict[str, dict[str, Any]] = {
        "features": {**FEATURES, "augmentation": FLIPPED if len(views) > 1 else None},
        "numerics": {**NUMERICS, "dtype": dtype},
        "plan": {"bags": len(bags), "part_instances": PART_INSTANCES},
    }
    made_from = {"dataset": "tiny", "weights": "random"}
    description = StoreDescription(format, taps, provenance, tuple(views), made_from)
    clean = dict(zip((bag.bag_id for bag in bags), views["0"], strict=True))
    instances = {
        bag_id: tuple(Instance(bag_id, f"{bag_id}/{k}.png", k) for k in range(max(1, len(maps))))
        for bag_id, maps in clean.items()
    }
    manifest = Manifest("tiny", "multilabel", LABELS, tuple(bags), instances, Path())
    sizes = [len(instances[bag.bag_id]) for bag in bags]
    parts = plan_parts(sizes, description.row_bytes, PART_INSTANCES)
    writer = open_writer(path, description, parts, manifest)
    for part in parts:
        with writer.part(part) as target:
            row = 0
            for k in part.bags:
                bag_id = bags[k].bag_id
                if k == UNUSABLE:
                    target.fail(row, Failure(bag_id, f"{bag_id}/0.png", "", "truncated"))
                    row += 1
                    continue
                rows = list(range(row, row + sizes[k]))
                records = [
                    InstanceRecord(i.image, (0, 0, 53, 41), i.order, bytes(32))
                    for i in instances[bag_id]
                ]
                for view, maps in views.items():
                    values = maps[k].astype(dtype)
                    means = maps[k].mean((2, 3)).astype(dtype)
                    target.put(rows, records, {"layer4": values, "gap": means}, view)
                row += sizes[k]
    writer.finish()


def main() -> None:
    """Write everything; ``v1/`` must not exist."""
    folder = Path(__file__).parent / "v1"
    (folder / "expected").mkdir(parents=True)
    os.chdir(folder)  # so that no record holds a path of this machine
    rng = np.random.default_rng(20261128)
    bags, maps = make_bags(rng)
    turned = [values[..., ::-1].copy() for values in maps]
    write_store(Path("hdf5.features"), "hdf5", "float32", bags, {"0": maps})
    write_store(Path("zarr.features"), "zarr", "float16", bags, {"0": maps, "1": turned})
    expected = {
        "layer4": np.concatenate(maps),
        "gap": np.concatenate([values.mean((2, 3)) for values in maps]),
        "view1": np.concatenate(turned),
        "offsets": np.cumsum([0, *map(len, maps)]),
    }
    for name, values in expected.items():
        np.save(f"expected/{name}.npy", values)
    for command in COMMANDS:
        app(shlex.split(command), standalone_mode=False)


if __name__ == "__main__":
    main()
