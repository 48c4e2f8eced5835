"""Digests of a store: by hand from the format's document, and each byte that they cover."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from run_stores import make_bags, make_features, with_splits, write_store

from dragn_cache.errors import DamagedPartError, StoreError
from dragn_cache.store import FORMATS, Store, open_store
from dragn_cache.store.config import Format
from dragn_cache.store.part import GROUPS
from dragn_cache.store.verify import move_aside, verify_store

LOST = 7
TYPES = {"offsets": "int64", "box": "int64", "order": "int64"}


@pytest.fixture(params=["hdf5", "zarr"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Forty bags in two parts; bag 007 has no usable input."""
    return make_store(tmp_path / "s", request.param)


def make_store(path: Path, form: Format) -> Store:
    bags = with_splits(make_bags(40))
    features = make_features(bags, most=5)
    features[bags[LOST].bag_id] = features[bags[LOST].bag_id][:0]
    return write_store(path, bags, features, form=form)


def by_plain_library(path: Path) -> Callable[[str], Any]:
    """Arrays of a part by name, texts as lists."""
    if path.suffix == ".zarr":
        group: Any = zarr.open_group(path, mode="r")
        return lambda name: group[name][...]
    file = h5py.File(path, "r")

    def read(name: str) -> Any:
        dataset = file[name]
        return dataset.asstr()[...] if dataset.dtype.kind == "O" else dataset[...]

    return read


def test_seals_are_those_of_the_document(store: Store) -> None:
    for number in store.parts:
        read = by_plain_library(store.part_path(number))
        for group, names in GROUPS.items():
            text = b""
            for name in names:
                values = read(f"{group}/{name}")
                numeric = group != "failures" and name not in ("id", "image")
                kind = TYPES.get(name, "uint8") if numeric else "utf-8"
                sizes = ",".join(str(n) for n in values.shape)
                text += name.encode() + b"\0" + kind.encode() + b"\0" + sizes.encode() + b"\0"
                if numeric:
                    text += values.astype("<i8" if kind == "int64" else "u1").tobytes()
                else:
                    text += b"".join(str(value).encode() + b"\0" for value in values)
            assert read(f"{group}/seal").tobytes() == hashlib.sha256(text).digest(), group


def test_the_digests_of_store_json_are_those_of_the_document(store: Store) -> None:
    record = json.loads((store.path / "store.json").read_text())
    with (store.path / "manifest" / "bags.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["part"] for row in rows}) == 2
    plan = "".join(f"{row['bag_id']}\0{row['part']}\n" for row in rows)
    assert record["digests"]["bags"] == hashlib.sha256(plan.encode()).hexdigest()
    of_file = record["digests"].pop("file")
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert of_file == hashlib.sha256(text.encode()).hexdigest()


def test_a_whole_store_has_no_faults(store: Store) -> None:
    warnings: list[str] = []
    faults = verify_store(open_store(store.path, warn=warnings.append))
    assert faults.is_whole
    assert (faults.parts, faults.missing, faults.tables, faults.unchecked) == ((), (), (), "")
    assert warnings == []


def change(path: Path, name: str, at: tuple[int, ...], value: Any) -> None:
    """Change one value of an array, by the plain library."""
    if path.suffix == ".zarr":
        array: Any = zarr.open_group(path, mode="r+")[name]
        array[at] = value
        return
    with h5py.File(path, "r+") as file:
        file[name][at] = value


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("instances/box", (3, 0), 1024),
        ("instances/order", (2,), 9),
        ("instances/digest", (5, 31), 255),
        ("instances/image", (4,), "other.png"),
        ("bags/plan", (1, 0), 255),
        ("failures/reason", (0,), "truncates"),
        ("failures/seal", (1,), 255),
    ],
)
def test_what_no_digest_of_features_covers_is_sealed(
    store: Store, name: str, at: tuple[int, ...], value: Any
) -> None:
    change(store.part_path(0), name, at, value)
    faults = verify_store(open_store(store.path))
    assert faults.damaged == (0,)
    group = name.partition("/")[0]
    assert {why for _, why in faults.parts[0].bags} == {f"{group} are not as their seal has them"}
    with pytest.raises(DamagedPartError, match=f"{group} are not as their seal"):
        open_store(store.path).instances("000")


def test_offsets_are_compared_before_features_are_loaded(store: Store) -> None:
    """One bag's row given to the next: the offsets stay sound by themselves."""
    edges = store.index(0).offsets
    k = int(np.flatnonzero(np.diff(edges) > 1)[0])
    change(store.part_path(0), "bags/offsets", (k + 1,), int(edges[k + 1]) - 1)
    with pytest.raises(DamagedPartError, match="bags are not as their seal has them"):
        open_store(store.path).load("gap")


def test_a_part_that_lost_its_seal_is_damaged(store: Store) -> None:
    if store.description.format == "zarr":
        del zarr.open_group(store.part_path(1), mode="r+")["instances/seal"]
    else:
        with h5py.File(store.part_path(1), "r+") as file:
            del file["instances/seal"]
    assert verify_store(store).damaged == (1,)
    with pytest.raises(DamagedPartError, match="no instances/seal"):
        open_store(store.path).index(1)


def test_a_table_of_bags_that_is_cut_short_is_refused(store: Store) -> None:
    table = store.path / "manifest" / "bags.csv"
    lines = table.read_text().splitlines(keepends=True)
    for changed in (
        lines[:-3],
        [*lines[:5], *reversed(lines[5:7]), *lines[7:]],
        [*lines[:-1], lines[-1].replace("039", "038x")],
        [*lines[:-1], lines[-1].rpartition(",")[0] + ",0\n"],
    ):
        assert changed != lines
        table.write_text("".join(changed))
        with pytest.raises(StoreError, match=r"bags\.csv: expected the bags and parts that store"):
            open_store(store.path)


def test_other_labels_are_a_warning_until_they_are_written_down(store: Store) -> None:
    folder = store.path / "manifest"
    text = (folder / "bags.csv").read_text()
    (folder / "bags.csv").write_text(text.replace("actin", "golgi", 1))
    warnings: list[str] = []
    changed = open_store(store.path, warn=warnings.append)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{folder / 'bags.csv'}: not as it was written; if you changed")
    assert verify_store(changed).tables == tuple(warnings)
    command = warnings[0].partition("run ")[2].partition(" in that folder")[0]
    subprocess.run(command, shell=True, cwd=folder, check=True)
    warnings.clear()
    assert verify_store(open_store(store.path, warn=warnings.append)).is_whole
    assert warnings == []


def test_a_changed_description_is_told(store: Store) -> None:
    path = store.path / "manifest" / "dataset.toml"
    text = path.read_text()
    path.write_text(text.replace('name = "tiny"', 'name = "tidy"'))
    (fault,) = verify_store(open_store(store.path)).tables
    assert fault.startswith(f"{path}: not as it was written")
    path.write_text(text.replace("actin", "actim"))  # then no bag's label is known
    with pytest.raises(StoreError, match=r"dataset\.toml: expected the file as it was written"):
        open_store(store.path)


def test_lost_or_changed_checksums_are_told(store: Store) -> None:
    path = store.path / "manifest" / "SHA256SUMS"
    path.write_text(path.read_text().replace("dataset.toml", "dataset.tonl"))
    faults = verify_store(open_store(store.path)).tables
    assert [fault.partition(": not as")[0] for fault in faults] == [
        str(path.with_name("dataset.toml")),
        str(path.with_name("dataset.tonl")),
    ]
    path.unlink()
    (fault,) = verify_store(open_store(store.path)).tables
    assert fault.startswith(f"{path}: lost")


def test_failures_are_those_of_the_parts(store: Store) -> None:
    path = store.path / "failures.csv"
    path.write_text(path.read_text().replace("truncated", "truncates"))
    (fault,) = verify_store(store).tables
    assert fault.startswith(f"{path}: not what the parts say")
    path.unlink()  # it may be deleted
    assert verify_store(store).is_whole


def test_what_could_not_be_read_is_not_moved_aside(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock, a permission, no memory: nothing is then known of the part."""
    form = FORMATS[store.description.format]
    read = form.read_index

    def refusing(path: Path) -> Any:
        if path == store.part_path(0):
            raise error
        return read(path)

    monkeypatch.setattr(form, "read_index", refusing)
    refusals = [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")]
    for refusal in [*refusals, BlockingIOError(11, "unable to lock file"), MemoryError()]:
        error: Exception = refusal
        faults = verify_store(open_store(store.path))
        assert [(part.number, part.was_read) for part in faults.parts] == [(0, False)]
        assert len(faults.parts[0].bags) == len(store.planned(0))
        assert faults.damaged == ()
        assert not faults.is_whole
    error = ValueError("bytes of no HDF5 file")
    faults = verify_store(open_store(store.path))
    assert faults.damaged == (0,)
    (moved,) = move_aside(store, faults.damaged)
    assert moved.parent == store.path / "damaged"


def test_two_hundred_changed_bits_are_noticed_or_without_effect() -> None:
    """Some of `make faults`, in every kind of folder."""
    flips = Path(__file__).parents[1] / "flips.py"
    run = subprocess.run(
        [sys.executable, flips, "--bits", "50", "--jobs", "1"], stdout=-1, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("50 changes") == 4
