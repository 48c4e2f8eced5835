"""Fixtures: small data sets of real image files, drawn from a seed."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dragn_cache.manifest import Manifest, read_manifest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch comes

LABELS = ("actin", "nucleus", "golgi")


def draw_image(path: Path, rng: np.random.Generator, height: int, width: int) -> None:
    """A colour PNG of smooth random blobs."""
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_dataset(folder: Path, sizes: Sequence[int], *, seed: int = 0) -> Path:
    """A data set of bags with the given numbers of 41×53 images, and random labels."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.toml").write_text(
        f'name = "tiny"\ntask = "multilabel"\nlabels = {list(LABELS)}\n'.replace("'", '"')
    )
    with (folder / "bags.csv").open("w") as bags, (folder / "instances.csv").open("w") as rows:
        bag_table, row_table = csv.writer(bags), csv.writer(rows)
        bag_table.writerow(["bag_id", "labels", "stage"])
        row_table.writerow(["bag_id", "image", "order"])
        for k, size in enumerate(sizes):
            bag_id = f"0{k:02d}"
            chosen = [label for label in LABELS if rng.random() < 0.5]
            bag_table.writerow([bag_id, ";".join(chosen), f"s{k % 3}"])
            for order in range(size):
                image = f"img/{bag_id}_{order}.png"
                draw_image(folder / image, rng, 41, 53)
                row_table.writerow([bag_id, image, order])
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Manifest]:
    """Write a data set of the given bag sizes and read its manifest."""

    def make(sizes: Sequence[int], *, seed: int = 0) -> Manifest:
        return read_manifest(write_dataset(tmp_path / f"tiny{seed}", sizes, seed=seed))

    return make
