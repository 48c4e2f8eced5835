"""The plan of an extraction: the store that is made is the one that was planned."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image, write_dataset
from small_extractions import CONFIG

from dragn_cache.errors import InputError
from dragn_cache.extraction.extract import extract
from dragn_cache.extraction.plan import plan_extraction
from dragn_cache.manifest import read_manifest
from dragn_cache.store import open_store


def test_the_store_is_the_planned_one(tmp_path: Path) -> None:
    manifest = read_manifest(write_dataset(tmp_path / "d", [3, 1, 5, 2, 7, 1, 4]))
    plan = plan_extraction(manifest, CONFIG, None)
    assert (plan.bag_sizes, plan.instances) == ((3, 1, 5, 2, 7, 1, 4), 23)
    assert (plan.compute, plan.precision) == ("eager", "float32")
    # At most six instances a part; the bag of seven is a part of its own.
    assert [part.bags for part in plan.parts] == [(0, 1), (2,), (3,), (4,), (5, 6)]
    extract(manifest, CONFIG, tmp_path / "s")
    store = open_store(tmp_path / "s")
    by_hand = hashlib.sha256()
    for number, bags in enumerate([("000", "001"), ("002",), ("003",), ("004",), ("005", "006")]):
        by_hand.update("".join(f"{bag}\0{number}\n" for bag in bags).encode())
    assert store.description == replace(plan.description, bags=by_hand.hexdigest())
    assert [tuple(store.index(number).ids) for number in store.parts] == [
        tuple(manifest.bags[bag].bag_id for bag in part.bags) for part in plan.parts
    ]


def test_an_image_feeds_all_its_rows_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for name in ("a", "b"):
        draw_image(tmp_path / f"{name}.png", rng, 61, 83)
    (tmp_path / "t.csv").write_text(
        "bag_id,labels,image,x0,y0,x1,y1\n"
        "p,u,a.png,0,0,31,29\np,u,b.png,,,,\np,u,a.png,40,20,83,61\nq,v,a.png,10,5,50,45\n"
    )
    plan = plan_extraction(read_manifest(tmp_path / "t.csv"), CONFIG, None)
    (part,) = plan.parts
    assert [
        (image.request.image, [row for row, _ in image.instances], image.request.boxes)
        for image in plan.images_of(part)
    ] == [
        ("a.png", [0, 2, 3], ((0, 0, 31, 29), (40, 20, 83, 61), (10, 5, 50, 45))),
        ("b.png", [1], (None,)),
    ]


def test_channels_that_the_data_set_lacks_are_refused_before_any_image(tmp_path: Path) -> None:
    manifest = read_manifest(write_dataset(tmp_path / "d", [2]))
    with pytest.raises(InputError, match="expected a known channel, got 'er'"):
        plan_extraction(manifest, CONFIG.replace(rgb=("er", "red", "green")), None)
