"""Updates: every change is noticed, only what changed is computed, and a killed update goes on."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image, write_dataset
from folder_bytes import tree
from small_extractions import CONFIG, config

from dragn_cache.errors import StoreError, StoreMismatchError
from dragn_cache.extraction.extract import extract
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.manifest import Manifest, read_manifest
from dragn_cache.store import FORMATS, open_store
from dragn_cache.store.update import UpdateReport
from dragn_cache.store.verify import verify_part

SIZES = [3, 1, 5, 2, 7, 1, 4]


@pytest.fixture(params=list(FORMATS))
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def update(folder: Path, out: Path, **changes: object) -> tuple[ExtractReport, UpdateReport]:
    report = extract(read_manifest(folder), config(**changes), out, update=True)
    assert report.update is not None
    return report, report.update


def edit(folder: Path, *, drop: str = "", add: tuple[str, int] | None = None) -> None:
    """Remove a bag from the tables, or add one in front of all others."""
    for name in ("bags.csv", "instances.csv"):
        with (folder / name).open() as file:
            head, *rows = list(csv.reader(file))
        rows = [row for row in rows if row[0] != drop]
        if add is not None:
            bag, size = add
            new = [[bag, "golgi", "s9"]]
            if name == "instances.csv":
                new = [[bag, f"img/{bag}_{k}.png", str(k)] for k in range(size)]
                for row in new:
                    draw_image(folder / row[1], np.random.default_rng(len(row[1])), 41, 53)
            rows = new + rows
        with (folder / name).open("w") as file:
            csv.writer(file).writerows([head, *rows])


def same_features(out: Path, folder: Path, fresh: Path, format: str) -> None:
    """A store's features equal those of a store made from scratch."""
    extract(read_manifest(folder), config(format=format), fresh)
    for tap in ("stage2", "gap"):
        values, offsets = open_store(out).load(tap)
        wanted, wanted_offsets = open_store(fresh).load(tap)
        np.testing.assert_array_equal(offsets, wanted_offsets)
        np.testing.assert_allclose(values, wanted, rtol=2e-3, atol=1e-6)  # other batch mates
    store = open_store(out)
    assert store.bag_ids == open_store(fresh).bag_ids
    assert [verify_part(store, number).bags for number in store.parts] == [()] * len(store.parts)


def test_nothing_changed_nothing_done(tmp_path: Path, format: str) -> None:
    folder = write_dataset(tmp_path / "d", SIZES)
    extract(read_manifest(folder), config(format=format), tmp_path / "s")
    before = tree(tmp_path / "s")
    report, found = update(folder, tmp_path / "s", format=format)
    assert (found.kept, found.changed, found.new, found.removed) == (7, (), (), ())
    assert report.images_decoded == 0
    assert tree(tmp_path / "s") == before


def test_changed_new_and_removed_bags(tmp_path: Path, format: str) -> None:
    folder, out = write_dataset(tmp_path / "d", SIZES), tmp_path / "s"
    extract(read_manifest(folder), config(format=format), out)
    kept = open_store(out).bag("004", "gap")
    before_it = open_store(out).digests(["002", "004"])
    draw_image(folder / "img" / "002_3.png", np.random.default_rng(99), 41, 53)
    edit(folder, drop="001")
    edit(folder, add=("900", 3))
    with pytest.raises(StoreMismatchError, match=r"plan\.manifest_sha256.*`update=True`"):
        extract(read_manifest(folder), config(format=format), out)
    report, found = update(folder, out, format=format)
    assert (found.changed, found.new, found.removed) == (("002",), ("900",), ("001",))
    assert (found.kept, report.instances_done) == (5, 3 + 5)
    np.testing.assert_array_equal(open_store(out).bag("004", "gap"), kept)
    digests = open_store(out).digests(["002", "004"])  # the old features of 002 are still there
    assert (digests == before_it).all(1).tolist() == [False, True]
    same_features(out, folder, tmp_path / "fresh", format)
    assert sum(open_store(out).rows(n) for n in open_store(out).parts) == sum(SIZES) - 1 + 3
    # From now on it is as complete as any store: both commands have nothing to do.
    before = tree(out)
    assert extract(read_manifest(folder), config(format=format), out).parts_written == 0
    assert update(folder, out, format=format)[1].kept == 7
    assert tree(out) == before


def test_a_part_whose_bags_are_all_replaced_is_removed(tmp_path: Path, format: str) -> None:
    folder, out = write_dataset(tmp_path / "d", SIZES), tmp_path / "s"
    extract(read_manifest(folder), config(format=format), out)
    assert open_store(out).index(1).ids == ("002",)
    draw_image(folder / "img" / "002_0.png", np.random.default_rng(98), 41, 53)
    update(folder, out, format=format)
    assert open_store(out).parts == [0, 2, 3, 4, 5]
    names = {path.name.partition(".")[0] for path in (out / "parts").iterdir()}
    assert names == {"00000", "00002", "00003", "00004", "00005"}


def test_a_moved_box_is_a_change_and_a_new_label_is_none(tmp_path: Path) -> None:
    folder, out = write_dataset(tmp_path / "d", [2, 3]), tmp_path / "s"
    extract(read_manifest(folder), CONFIG, out)
    (folder / "bags.csv").write_text("bag_id,labels\n000,golgi\n001,actin\n")
    assert update(folder, out)[1].kept == 2
    assert open_store(out).bags[0].labels == ("golgi",)
    rows = (folder / "instances.csv").read_text().splitlines()
    boxed = [f"{row},,,," for row in rows[1:]]
    boxed[0] = f"{rows[1]},0,0,53,41"  # the same pixels, but not the same words
    (folder / "instances.csv").write_text("\n".join([rows[0] + ",x0,y0,x1,y1", *boxed]) + "\n")
    _, found = update(folder, out)
    assert (found.changed, found.kept) == (("000",), 1)


def test_an_input_that_failed_is_tried_again(tmp_path: Path, format: str) -> None:
    folder, out = write_dataset(tmp_path / "d", SIZES), tmp_path / "s"
    spoilt = folder / "img" / "004_2.png"
    good = spoilt.read_bytes()
    spoilt.write_bytes(good[:-40])
    lenient = {"format": format, "on_error": "skip"}
    first = extract(read_manifest(folder), config(**lenient), out)
    assert len(first.failures) == 1
    report, found = update(folder, out, **lenient)
    assert (found.kept, len(report.failures)) == (7, 1)
    spoilt.write_bytes(good)
    report, found = update(folder, out, **lenient)
    assert (found.changed, report.failures) == (("004",), [])
    assert (out / "failures.csv").read_text() == "bag_id,image,box,reason\n"
    same_features(out, folder, tmp_path / "fresh", format)


def test_other_features_are_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [2, 3])
    extract(read_manifest(folder), CONFIG, tmp_path / "s")
    before = tree(tmp_path / "s")
    with pytest.raises(StoreMismatchError, match=r"features\.weights_sha256"):
        update(folder, tmp_path / "s", weights="random:4")
    assert tree(tmp_path / "s") == before


class KilledError(Exception):
    """Stands for a kill at a moment of choice."""


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("again", [True, False])
def test_an_interrupted_update_becomes_the_same_bytes(
    tmp_path: Path, format: str, after: int, again: bool
) -> None:
    """Goes on with --update, and with a plain extract too."""
    folder, out = write_dataset(tmp_path / "d", SIZES), tmp_path / "s"
    extract(read_manifest(folder), config(format=format), out)
    shutil.copytree(out, tmp_path / "whole")
    for image in ("000_1", "002_3", "004_6"):
        draw_image(folder / "img" / f"{image}.png", np.random.default_rng(97), 41, 53)
    edit(folder, add=("900", 2))
    manifest = read_manifest(folder)
    update(folder, tmp_path / "whole", format=format)
    interrupt(manifest, format, out, after)
    extract(manifest, config(format=format), out, update=again)
    assert tree(out) == tree(tmp_path / "whole")


def interrupt(manifest: Manifest, format: str, out: Path, after: int) -> None:
    seen = 0

    def stop(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise KilledError

    with pytest.raises(KilledError):
        extract(manifest, config(format=format, batch_size=8), out, update=True, progress=stop)


def test_an_update_killed_between_its_two_tables_goes_on(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_dataset(tmp_path / "d", SIZES), tmp_path / "s"
    extract(read_manifest(folder), config(format=format), out)
    shutil.copytree(out, tmp_path / "whole")
    edit(folder, drop="004")
    edit(folder, add=("900", 2))
    update(folder, tmp_path / "whole", format=format)

    def killed(*given: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("dragn_cache.store.update.write_description", killed)
        with pytest.raises(KilledError):
            update(folder, out, format=format)
    with pytest.raises(StoreMismatchError, match="`update=True`"):
        extract(read_manifest(folder), config(format=format), out)
    update(folder, out, format=format)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_lost_table_of_an_updated_store_is_found_in_its_parts(
    tmp_path: Path, format: str
) -> None:
    folder, out = write_dataset(tmp_path / "d", SIZES), tmp_path / "s"
    extract(read_manifest(folder), config(format=format), out)
    draw_image(folder / "img" / "002_3.png", np.random.default_rng(96), 41, 53)
    update(folder, out, format=format)
    before = tree(out)
    shutil.rmtree(out / "manifest")
    with pytest.raises(
        StoreError, match="extract with `update=True`: it finds the bags in the parts"
    ):
        extract(read_manifest(folder), config(format=format), out)
    assert update(folder, out, format=format)[1].kept == 7
    assert tree(out) == before
