"""One contract for every format: writing, reading, resuming, verifying and refusing."""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from folder_bytes import tree
from hypothesis import given
from hypothesis import strategies as st

from dragn_cache.errors import DamagedPartError, StoreError, StoreMismatchError, UnknownNameError
from dragn_cache.manifest import Bag, Instance, Manifest
from dragn_cache.store import (
    FORMATS,
    Failure,
    InstanceRecord,
    Store,
    StoreDescription,
    Tap,
    open_store,
    open_writer,
    plan_parts,
    tables,
)
from dragn_cache.store.claims import Claims, living_tokens
from dragn_cache.store.verify import verify_part
from dragn_cache.store.zarr_format import chunk_and_shard_rows

SIZES = [3, 1, 5, 2, 7, 1]
TAPS = (Tap("layer4.0", (5, 2, 3), "float16"), Tap("gap", (11,), "float16"))
LOST = {("b2", 1), ("b5", 0)}  # rows that could not be used; b5 is left with none

pytestmark = pytest.mark.parametrize("format", list(FORMATS))


def manifest(sizes: Sequence[int] = SIZES) -> Manifest:
    bags = tuple(
        Bag(f"b{k}", ("x",) if k % 2 else (), extra={"part": "user", "stage": f"s{k}"})
        for k in range(len(sizes))
    )
    instances = {
        f"b{k}": tuple(Instance(f"b{k}", f"{k}/{j}.png", j) for j in range(n))
        for k, n in enumerate(sizes)
    }
    return Manifest("tiny", "multilabel", ("x", "y"), bags, instances, Path())


def features(bag: str, order: int, tap: Tap) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(f"{bag}{order}{tap.name}".encode()).digest()[:4], "big")
    return np.random.default_rng(seed).normal(size=tap.shape).astype(tap.dtype)


def describe(format: str, **changes: object) -> StoreDescription:
    provenance = {
        "features": {"backbone": "net", "taps": [t.name for t in TAPS], "size": (3, 5)},
        "numerics": {"dtype": "float16", "batch_size": 4},
        "plan": {"instances": sum(SIZES), "part_instances": 6},
    }
    for path, value in changes.items():
        kind, key = path.split("__")
        provenance[kind] = {**provenance[kind], key: value}
    return StoreDescription(format, TAPS, provenance)  # type: ignore[arg-type]


def write(
    path: Path, format: str, *, only: int | None = None, sizes: Sequence[int] = SIZES
) -> Path:
    """Write or continue the store; ``only`` limits how many parts this call writes."""
    table = manifest(sizes)
    description = describe(format)
    parts = plan_parts(sizes, description.row_bytes, 6)
    writer = open_writer(path, description, parts, table)
    for part in writer.missing()[:only]:
        bags = [table.bags[k] for k in part.bags]
        with writer.part(part) as w:
            rows = [row for bag in bags for row in table.instances[bag.bag_id]]
            numbers = list(range(len(rows)))
            for start in range(1, len(rows) + 1, 3):  # any order, several calls
                batch = [n for n in numbers[start - 1 : start + 2] if not _lost(rows[n])]
                w.put(
                    batch,
                    [
                        InstanceRecord(rows[n].image, (0, n, 5, 7), rows[n].order, bytes([n]) * 32)
                        for n in batch
                    ],
                    {
                        t.name: np.array(
                            [features(rows[n].bag_id, rows[n].order, t) for n in batch], t.dtype
                        ).reshape(-1, *t.shape)
                        for t in TAPS
                    },
                )
            for n in numbers:
                if _lost(rows[n]):
                    w.fail(n, Failure(rows[n].bag_id, rows[n].image, "", "truncated"))
    writer.finish()
    return path


def _lost(row: Instance) -> bool:
    return (row.bag_id, row.order) in LOST


def expected(bag: int, tap: Tap) -> np.ndarray:
    rows = [features(f"b{bag}", j, tap) for j in range(SIZES[bag]) if (f"b{bag}", j) not in LOST]
    return np.array(rows, tap.dtype).reshape(-1, *tap.shape)


def test_what_is_written_is_read(tmp_path: Path, format: str) -> None:
    store = open_store(write(tmp_path / "s", format))
    for tap in TAPS:
        for k in range(len(SIZES)):
            got = store.bag(f"b{k}", tap.name)
            assert got.dtype == tap.dtype
            np.testing.assert_array_equal(got, expected(k, tap))
    assert store.bag("b5").shape == (0, 5, 2, 3)


def test_loading_gives_rows_and_offsets_in_the_order_asked_for(tmp_path: Path, format: str) -> None:
    store = open_store(write(tmp_path / "s", format))
    values, offsets = store.load("gap")
    assert offsets.tolist() == [0, 3, 4, 8, 10, 17, 17]
    np.testing.assert_array_equal(values, np.concatenate([expected(k, TAPS[1]) for k in range(6)]))
    order = [4, 0, 5, 1, 2, 2]
    values, offsets = store.load("layer4.0", bags=[f"b{k}" for k in order])
    assert offsets.tolist() == [0, 7, 10, 10, 11, 15, 19]
    np.testing.assert_array_equal(values, np.concatenate([expected(k, TAPS[0]) for k in order]))
    values, offsets = store.load("gap", bags=[])
    assert values.shape == (0, 11)
    assert offsets.tolist() == [0]


def test_plain_libraries_read_a_part_as_the_format_document_says(
    tmp_path: Path, format: str
) -> None:
    path = write(tmp_path / "s", format)
    record = json.loads((path / "store.json").read_text())
    part = path / "parts" / {"hdf5": "00000.h5", "zarr": "00000.zarr"}[format]
    root = h5py.File(part, "r") if format == "hdf5" else zarr.open_group(part, mode="r")
    ids = [i.decode() if isinstance(i, bytes) else str(i) for i in root["bags/id"][...]]
    offsets = root["bags/offsets"][...]
    assert ids == ["b0", "b1"]
    assert offsets.tolist() == [0, 3, 4]
    hashes = [hashlib.sha256() for _ in ids]
    for tap in record["taps"]:
        for view in record["views"]:
            rows = root[f"taps/{tap['name']}/{view}"][...]
            assert rows.shape == (4, *tap["shape"])
            assert rows.dtype == tap["dtype"]
            for k, digest in enumerate(hashes):
                digest.update(rows[offsets[k] : offsets[k + 1]].astype(tap["dtype"]).tobytes())
    assert [h.digest() for h in hashes] == [d.tobytes() for d in root["bags/digest"][...]]
    assert root["instances/order"][...].tolist() == [0, 1, 2, 0]
    assert root["instances/box"][...][2].tolist() == [0, 2, 5, 7]
    assert root["instances/digest"][...][3].tobytes() == bytes([3]) * 32
    if format == "hdf5":
        root.close()


def test_direct_reads_equal_the_librarys(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "s", format)
    store = open_store(path)
    for number in store.parts:
        part = store.part_path(number)
        root = h5py.File(part, "r") if format == "hdf5" else zarr.open_group(part, mode="r")
        for tap in TAPS:
            whole = root[f"taps/{tap.name}/0"][...]
            for start, stop in [(0, len(whole)), (1, len(whole)), (0, len(whole) // 2)]:
                if start > stop:
                    continue
                out = np.empty((stop - start, *tap.shape), tap.dtype)
                FORMATS[format].read_rows(part, tap, "0", [(start, out)])
                np.testing.assert_array_equal(out, whole[start:stop])
        if format == "hdf5":
            root.close()


def test_direct_reads_cross_chunks_and_shards(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dragn_cache.store.zarr_format.CHUNK_BYTES", 130)  # 2 rows of 60 B, 5 of 22
    monkeypatch.setattr("dragn_cache.store.zarr_format.SHARD_BYTES", 250)
    monkeypatch.setattr("dragn_cache.store.part.BLOCK_BYTES", 100)
    store = open_store(write(tmp_path / "s", format))
    for tap in TAPS:
        values, _ = store.load(tap.name)
        np.testing.assert_array_equal(values, np.concatenate([expected(k, tap) for k in range(6)]))
        np.testing.assert_array_equal(store.bag("b4", tap.name)[3], features("b4", 3, tap))


@given(rows=st.integers(0, 5000), row_bytes=st.integers(1, 10**7))
def test_shards_hold_whole_chunks_and_waste_little(format: str, rows: int, row_bytes: int) -> None:
    chunk, shard = chunk_and_shard_rows(rows, row_bytes)
    assert shard % chunk == 0
    assert chunk == 1 or chunk * row_bytes <= 2 * 2**20
    assert shard == chunk or shard * row_bytes <= 128 * 2**20
    shards = -(-rows // shard)
    assert shards * shard - rows < chunk * (shards + 1)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_an_interrupted_store_becomes_the_same_bytes(
    tmp_path: Path, format: str, stop_after: int
) -> None:
    whole = write(tmp_path / "whole", format)
    broken = write(tmp_path / "broken", format, only=stop_after)
    assert len(open_store(broken).missing_parts()) == 5 - stop_after
    leave_a_dead_claim(broken)
    write(broken, format)
    assert tree(broken) == tree(whole)


def leave_a_dead_claim(store: Path) -> None:
    """Make the files that a killed process leaves: its claim and a scratch folder."""
    program = (
        "import os, pathlib, sys; from dragn_cache.store.claims import Claims\n"
        "claims = Claims(pathlib.Path(sys.argv[1]))\n"
        "assert claims.acquire('00003')\n"
        "scratch = claims.folder / f'.00003.{claims.token}'\n"
        "scratch.mkdir()\n"
        "(scratch / 'tap0.rows').write_bytes(b'half')\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(store / "parts")], check=True)
    assert len(list((store / "parts").glob(".00003.*"))) == 2


def test_a_claim_that_comes_while_leftovers_are_removed_keeps_its_folder(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = write(tmp_path / "s", format) / "parts"
    dead = parts / ".00001.0123456789abcdef"
    dead.mkdir()
    with Claims(parts) as claims:
        new = parts / f".00003.{claims.token}"

        def slow(folder: Path) -> set[str]:
            tokens = living_tokens(folder)
            claims.acquire("00003")
            new.mkdir()
            return tokens

        monkeypatch.setattr(tables, "living_tokens", slow)
        tables.remove_leftovers(tmp_path / "s")
        assert new.exists()
        assert not dead.exists()


def test_a_folder_is_no_longer_its_holders_while_it_is_emptied(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = write(tmp_path / "s", format) / "parts"
    dead = parts / ".00001.0123456789abcdef"
    dead.mkdir()
    there = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: there.append(dead.exists()))
    tables.remove_leftovers(tmp_path / "s")
    assert there == [False]


def test_a_part_whose_folder_was_taken_away_is_not_completed(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table, description = tmp_path / "s", manifest(), describe(format)
    made = open_writer(path, description, plan_parts(SIZES, description.row_bytes, 6), table)
    complete = type(made.format).write

    def write_half(self: object, growing: Path, *args: Any) -> None:
        complete(made.format, growing, *args)
        shutil.rmtree(growing.parent)
        growing.mkdir(parents=True)  # as Zarr does for its next file
        (growing / "zarr.json").write_text("{}")

    monkeypatch.setattr(type(made.format), "write", write_half)
    with made.part(made.parts[0]):
        pass
    assert list((path / "parts").iterdir()) == []


def test_an_exception_leaves_no_part_and_no_scratch(tmp_path: Path, format: str) -> None:
    path, table, description = tmp_path / "s", manifest(), describe(format)
    writer = open_writer(path, description, plan_parts(SIZES, description.row_bytes, 6), table)

    def fill() -> None:
        with writer.part(writer.parts[0]) as part:
            part.put(
                [0],
                [InstanceRecord("i", (0, 0, 1, 1), 0, bytes(32))],
                {t.name: np.zeros((1, *t.shape), t.dtype) for t in TAPS},
            )
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fill()
    assert list((path / "parts").iterdir()) == []


def test_the_store_carries_the_manifests_bags_with_their_part(tmp_path: Path, format: str) -> None:
    store = open_store(write(tmp_path / "s", format))
    assert [bag.extra["part"] for bag in store.bags] == ["0", "0", "1", "2", "3", "4"]
    assert [bag.extra["stage"] for bag in store.bags] == [f"s{k}" for k in range(6)]
    assert store.labels == ("x", "y")
    assert store.bags[1].labels == ("x",)
    assert store.failures() == [
        Failure("b2", "2/1.png", "", "truncated"),
        Failure("b5", "5/0.png", "", "truncated"),
    ]
    text = (store.path / "failures.csv").read_text()
    assert text == "bag_id,image,box,reason\nb2,2/1.png,,truncated\nb5,5/0.png,,truncated\n"


def test_other_settings_are_refused_by_name(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "s", format)
    parts = plan_parts(SIZES, describe(format).row_bytes, 6)
    other = describe(format, features__size=(3, 7), numerics__batch_size=8)
    message = (
        r"features.size is \[3, 5\], asked for \[3, 7\] · numerics.batch_size is 4, asked for 8"
    )
    with pytest.raises(StoreMismatchError, match=message):
        open_writer(path, other, parts, manifest())
    swapped = describe("zarr" if format == "hdf5" else "hdf5")
    with pytest.raises(StoreMismatchError, match=f"format is {format}"):
        open_writer(path, swapped, parts, manifest())


def test_a_foreign_folder_is_refused(tmp_path: Path, format: str) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(
        StoreError, match=r"expected a store, or a folder that is empty.*thesis.doc"
    ):
        open_writer(tmp_path, describe(format), plan_parts(SIZES, 82, 6), manifest())


def test_damage_is_found_and_named(tmp_path: Path, format: str) -> None:
    path = write(tmp_path / "s", format)
    store = open_store(path)
    assert [verify_part(store, n).bags for n in store.parts] == [()] * 5
    flip(path, format, features("b4", 6, TAPS[1]).tobytes())
    assert verify_part(store, 3).bags == (("b4", "features differ from their digest"),)
    assert verify_part(store, 1).bags == ()


def flip(path: Path, format: str, known: bytes) -> None:
    """Change one bit of a known row in the part's files."""
    for file in (path / "parts").rglob("*"):
        if file.is_file() and known in (data := file.read_bytes()):
            at = data.index(known) + 3
            file.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
            return
    raise AssertionError("the row is nowhere")


def truncate(part: Path) -> None:
    files = [part] if part.is_file() else [p for p in part.rglob("c/*") if p.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_a_chunk(part: Path) -> None:
    if part.is_file():
        part.write_bytes(b"")
    else:
        shutil.rmtree(part / "taps" / "gap" / "0" / "c")


@pytest.mark.parametrize("hurt", [truncate, lose_a_chunk])
def test_a_truncated_part_is_an_error_never_zeros(
    tmp_path: Path, format: str, hurt: Callable[[Path], None]
) -> None:
    path = write(tmp_path / "s", format)
    hurt(open_store(path).part_path(1))
    store = open_store(path)
    with pytest.raises(
        DamagedPartError, match=r"parts/00001\.\w+: expected .*verify .* `repair=True`"
    ):
        store.load("gap")
    assert [bag for bag, _ in verify_part(store, 1).bags] == ["b2"]
    assert store.bag("b0", "gap").shape == (3, 11)


def test_what_is_not_there_is_said(tmp_path: Path, format: str) -> None:
    store = open_store(write(tmp_path / "s", format, only=2))
    assert store.missing_parts() == [2, 3, 4]
    with pytest.raises(StoreError, match="expected 5 parts, got 2; run the same extract"):
        store.bag("b4")
    with pytest.raises(UnknownNameError, match=r"did you mean b4"):
        store.bag("b44")
    with pytest.raises(UnknownNameError, match=r"tap: .*did you mean layer4\.0"):
        store.load("layer4.1")
    with pytest.raises(UnknownNameError, match="view"):
        store.load("gap", view="1")
    with pytest.raises(StoreError, match="expected a feature store, got no such folder"):
        open_store(tmp_path / "nowhere")


def test_a_store_of_another_version_or_with_changed_provenance_is_refused(
    tmp_path: Path, format: str
) -> None:
    path = write(tmp_path / "s", format) / "store.json"
    original = path.read_text()
    for version in ("1", "4"):
        path.write_text(original.replace('"schema_version": 3', f'"schema_version": {version}'))
        with pytest.raises(StoreError, match=f"expected schema version 2 or 3, got {version}"):
            open_store(path.parent)
    others = [('"backbone": "net"', '"backbone": "other"'), ('"name": "gap"', '"name": "gaq"')]
    others += [('"revision": 0', '"revision": 1'), ('"schema_version": 3', '"schema_version": 2')]
    for old, new in others:
        assert original.count(old) == 1
        path.write_text(original.replace(old, new))
        with pytest.raises(StoreError, match="settings that do not give their digests"):
            open_store(path.parent)
    path.write_text(original.replace("{", '{"more": 1,', 1))
    with pytest.raises(StoreError, match="keys of no version"):
        open_store(path.parent)
    path.write_text(original[:-9])
    with pytest.raises(StoreError, match=r"store\.json: expected what dragn-cache wrote"):
        open_store(path.parent)


@pytest.mark.parametrize("name", ["../../elsewhere", "..", ".", "", "a/b", "/etc", "a\\b", "a\0"])
@pytest.mark.parametrize("kind", ["tap", "view"])
def test_names_that_lead_out_of_a_part_are_refused(
    tmp_path: Path, format: str, name: str, kind: str
) -> None:
    path = write(tmp_path / "s", format) / "store.json"
    record = json.loads(path.read_text())
    if kind == "tap":
        record["taps"][0]["name"] = name
    else:
        record["views"][0] = name
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError, match=r"got a field (taps|views) that is not of"):
        open_store(path.parent)


@given(
    sizes=st.lists(st.integers(0, 40), max_size=30),
    row_bytes=st.integers(1, 2 * 128 * 2**20),
    limit=st.integers(1, 50),
)
def test_a_plan_keeps_bags_whole_in_order_and_within_the_limits(
    format: str, sizes: list[int], row_bytes: int, limit: int
) -> None:
    parts = plan_parts(sizes, row_bytes, limit)
    assert [b for p in parts for b in p.bags] == list(range(len(sizes)))
    assert [p.number for p in parts] == list(range(len(parts)))
    for part in parts:
        held = [sizes[k] for k in part.bags if sizes[k]]
        if len(held) > 1:
            assert sum(held) <= limit
            assert sum(held) * row_bytes <= 128 * 2**20


def test_digests_do_not_depend_on_the_format(tmp_path: Path, format: str) -> None:
    store: Store = open_store(write(tmp_path / "s", format))
    digests = b"".join(store.index(n).digests.tobytes() for n in store.parts)
    by_hand = b"".join(
        hashlib.sha256(b"".join(expected(k, tap).tobytes() for tap in TAPS)).digest()
        for k in range(6)
    )
    assert digests == by_hand
    chosen = [4, 0, 3]
    digests = store.digests([store.bag_ids[k] for k in chosen])
    assert [row.tobytes() for row in digests] == [by_hand[32 * k : 32 * k + 32] for k in chosen]
    assert store.digests([]).shape == (0, 32)


@pytest.mark.parametrize("wrong", [[0, -7, 4], [0, 3, 5], [1, 3, 4], [0, 4], [3, 0, 4]])
def test_an_index_that_cannot_be_right_is_damage(
    tmp_path: Path, format: str, wrong: list[int]
) -> None:
    from dataclasses import replace

    path = write(tmp_path / "s", format)
    part = open_store(path).part_path(0)
    index = FORMATS[format].read_index(part)
    whole = {(t.name, "0"): _Rows(open_store(path).load(t.name)[0][:4]) for t in TAPS}
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    bent = replace(index, offsets=np.array(wrong, np.int64))
    FORMATS[format].write(part, bent, TAPS, ("0",), whole)  # type: ignore[arg-type]
    with pytest.raises(DamagedPartError, match=r"00000\.\w+: .*bags/offsets"):
        open_store(path).load("gap")
    assert [bag for bag, _ in verify_part(open_store(path), 0).bags] == ["b0", "b1"]


class _Rows:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


def test_bags_are_read_in_any_order_and_as_often_as_asked_for(tmp_path: Path, format: str) -> None:
    store = open_store(write(tmp_path / "s", format))
    rng = np.random.default_rng(0)
    for tap in TAPS:
        for order in (rng.permutation(6), rng.integers(0, 6, 17), [5], []):
            values, offsets = store.load(tap.name, bags=[f"b{k}" for k in order])
            pieces = [expected(k, tap) for k in order]
            np.testing.assert_array_equal(values, np.concatenate([values[:0], *pieces]))
            assert np.diff(offsets).tolist() == [len(rows) for rows in pieces]
            assert np.diff(offsets).tolist() == store.sizes([f"b{k}" for k in order]).tolist()
            assert values.ctypes.data % mmap.PAGESIZE == 0 or not len(values)


def test_a_store_that_another_process_begins_meanwhile_is_no_folder_of_others(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, table, description = tmp_path / "s", manifest(), describe(format)
    path.mkdir()
    parts = plan_parts(SIZES, description.row_bytes, 6)
    listed = Path.iterdir

    def begun_meanwhile(folder: Path) -> Iterator[Path]:
        if folder == path:
            (path / "store.json").write_text(description.to_json())
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", begun_meanwhile)
    with open_writer(path, description, parts, table) as writer:
        assert len(writer.missing()) == len(parts)
