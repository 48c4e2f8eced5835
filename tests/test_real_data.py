"""The whole way on real images, where they are at hand (../shared beside the checkout)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dragn_cache.check import check_dataset
from dragn_cache.config import ExtractConfig, TrainConfig
from dragn_cache.extract import extract
from dragn_cache.import_config import ImportConfig
from dragn_cache.interop import export_features, import_features
from dragn_cache.manifest import Manifest, read_manifest
from dragn_cache.runs import train_run
from dragn_cache.store import FORMATS, open_store

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_imagenet.pth"
MUSK = SHARED / "data" / "mil_features" / "musk1.npz"

needs_images = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason="needs real images and weights in ../shared, beside the checkout"
)
needs_musk = pytest.mark.skipif(
    not MUSK.is_file(), reason="needs musk1.npz in ../shared/data/mil_features, beside the checkout"
)


def first_bags(manifest: Manifest, count: int) -> Manifest:
    bags = manifest.bags[:count]
    return replace(
        manifest, bags=bags, instances={b.bag_id: manifest.instances[b.bag_id] for b in bags}
    )


@needs_images
@pytest.mark.parametrize("name", ["bdgp", "hpa_mosaics"])
def test_the_sets_have_no_fault(name: str) -> None:
    assert check_dataset(SHARED / "data" / name).faults == ()


@needs_images
@pytest.mark.parametrize("format", list(FORMATS))
def test_a_mosaic_of_nine_boxes_and_four_channels_is_decoded_once(
    tmp_path: Path, format: str
) -> None:
    manifest = first_bags(read_manifest(SHARED / "data" / "hpa_mosaics"), 3)
    config = ExtractConfig(
        backbone="mobilenet_v2", weights=str(WEIGHTS), size=(96, 96), format=format
    )
    report = extract(manifest, config, tmp_path / "s")
    assert (report.images_decoded, report.instances_done) == (3, 27)
    store = open_store(tmp_path / "s")
    assert store.load("gap")[0].shape == (27, 1280)
    assert store.index(0).boxes[4].tolist() == [512, 512, 1024, 1024]


@needs_images
def test_embryos_are_annotated_well_above_chance(tmp_path: Path) -> None:
    config = ExtractConfig(backbone="mobilenet_v2", weights=str(WEIGHTS), taps=("gap",))
    extract(read_manifest(SHARED / "data" / "bdgp"), config, tmp_path / "s")
    train = TrainConfig(aggregator="mean", intervals=0)
    metrics = train_run(open_store(tmp_path / "s"), train, tmp_path / "run")
    assert metrics["test"]["bags"] == 144
    assert metrics["test"]["auc_macro"] > 0.66


@needs_musk
@pytest.mark.parametrize("format", list(FORMATS))
def test_musk_trains_and_comes_back_from_clam_exactly(tmp_path: Path, format: str) -> None:
    config = ImportConfig(format=format)
    report = import_features(MUSK, tmp_path / "musk", config)
    assert (report.bags, report.instances) == (92, 476)
    store = open_store(tmp_path / "musk")
    assert sum(bag.labels == ("positive",) for bag in store.bags) == 47
    for aggregator in ("mean", "max"):
        train = TrainConfig(aggregator=aggregator, scale="standard", lr=3e-3, intervals=0)
        metrics = train_run(store, train, tmp_path / aggregator)
        assert metrics["test"]["auc_macro"] > 0.7
    export_features(store, tmp_path / "clam", "clam")
    import_features(tmp_path / "clam", tmp_path / "again", config)
    again = open_store(tmp_path / "again")
    with np.load(MUSK) as arrays:
        for opened in (store, again):
            values, offsets = opened.load()
            assert values.tobytes() == arrays["features"].tobytes()
            assert offsets.tolist() == arrays["offsets"].tolist()
            assert opened.bag_ids == arrays["bag_ids"].tolist()
    assert [(b.labels, b.split, b.group) for b in again.bags] == [
        (b.labels, b.split, b.group) for b in store.bags
    ]
