"""HDF5 that is damaged, hostile, locked, or written to a disk that refuses."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from file_limit import file_limit
from hypothesis import given
from hypothesis import strategies as st
from run_stores import make_bags, make_features, write_store

from dragn_cache.errors import DamagedPartError, InputError
from dragn_cache.interop import import_features
from dragn_cache.store import Store, hdf5_trial, open_store
from dragn_cache.store.hdf5_bytes import read_texts, read_values
from dragn_cache.store.hdf5_trial import open_alone, try_reading
from dragn_cache.store.hdf5_writing import writing_hdf5
from dragn_cache.store.verify import PartFaults, verify_part

TEXT = h5py.string_dtype()


def write_texts(path: Path, texts: list[str]) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=texts, dtype=TEXT, shape=(len(texts),))


def make_endless(path: Path) -> None:
    """Give the first text of a heap a size that turns to 0 where libhdf5 adds: it stays there."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, content.index(b"GCOL") + 16 + 8, 2**64 - 16)
    path.write_bytes(content)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    bags = make_bags(3)
    return write_store(tmp_path / "s", bags, make_features(bags, most=3))


# --- read in a process that may die --------------------------------------------------------------


def test_a_file_that_libhdf5_reads_for_ever_is_refused_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_trial, "CPU_SECONDS", 0)
    for name in ("a.h5", "b.h5"):
        write_texts(tmp_path / name, ["some", "text"])
    make_endless(tmp_path / "a.h5")
    with (
        pytest.raises(ValueError, match="HDF5 reads without an end"),
        open_alone(tmp_path / "a.h5"),
    ):
        pass
    with open_alone(tmp_path / "b.h5") as file:
        assert file["x"].asstr()[...].tolist() == ["some", "text"]


def test_a_file_on_which_the_process_dies_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stand-in for a crash of libhdf5: no bytes are known that make one.
    dying = "import os; os.write(1, b'ready\\n'); os.read(0, 1); os.abort()"
    monkeypatch.setattr(hdf5_trial, "START", dying)
    monkeypatch.setattr(hdf5_trial, "_TRIALS", {})
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.ones((2, 3), "f4")
    with pytest.raises(InputError, match=r"a\.h5: .*HDF5 ends its process \(SIGABRT\)"):
        import_features(tmp_path / "a.h5", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_process_reads_all_files_once_and_loads_no_torch(tmp_path: Path) -> None:
    for k in range(3):
        write_texts(tmp_path / f"{k}.h5", ["x"])
        assert try_reading(tmp_path / f"{k}.h5", lock=True) is None
    (trial,) = hdf5_trial._TRIALS.values()
    process = trial._process
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libhdf5" in maps
    assert "torch" not in maps
    process.kill()  # somebody ends it: the next file starts another, and known ones need none
    process.wait()
    assert try_reading(tmp_path / "0.h5", lock=True) is None
    assert list(hdf5_trial._TRIALS.values()) == [trial]
    write_texts(tmp_path / "0.h5", ["x", "another state of the file"])
    assert try_reading(tmp_path / "0.h5", lock=True) is None
    assert list(hdf5_trial._TRIALS.values()) != [trial]


def test_texts_that_share_their_bytes_are_refused_before_they_fill_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_texts(path, ["y" * 2**16, *(str(k) for k in range(5000))])
    with h5py.File(path) as file:
        place = file["x"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place : place + 16 * 5001] = bytes(content[place : place + 16]) * 5001
    path.write_bytes(content)
    with pytest.raises(ValueError, match="texts that are longer than the file"):
        try_reading(path, lock=True)
    with (
        path.open("rb", buffering=0) as raw,
        h5py.File(path) as file,
        pytest.raises(ValueError, match="x has longer texts than its file"),
    ):
        read_texts(raw, file["x"])


# --- a store's parts -----------------------------------------------------------------------------


def test_an_endless_part_is_damaged_for_reading_and_for_verify(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_trial, "CPU_SECONDS", 0)
    make_endless(store.part_path(0))
    reading = open_store(store.path)
    with pytest.raises(DamagedPartError, match=r"00000\.h5: .*a heap of texts is damaged"):
        reading.load("gap")
    faults = verify_part(reading, 0)
    endless = "bytes that HDF5 reads without an end (stopped after 0 s)"
    assert faults == PartFaults(0, tuple((b, endless) for b in reading.planned(0)), was_read=True)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_texts_are_those_that_h5py_wrote(texts: list[str]) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp"), f"texts-{os.getpid()}.h5")
    try:
        write_texts(path, texts)
        with path.open("rb", buffering=0) as raw, h5py.File(raw) as file:
            assert read_texts(raw, file["x"]) == texts
    finally:
        path.unlink()


def test_values_are_those_that_h5py_reads_and_lie_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    numbers = np.arange(7 * 5, dtype=">i4").reshape(7, 5)
    with h5py.File(path, "w") as file:
        file["x"] = numbers
        file.create_dataset("none", (0, 3), "i8")
        file.create_dataset("huge", (2**40, 3), "i8")
        file["texts"] = ["a"]
    with path.open("rb", buffering=0) as raw, h5py.File(raw) as file:
        np.testing.assert_array_equal(read_values(raw, file["x"]), numbers)
        assert read_values(raw, file["none"]).shape == (0, 3)
        with pytest.raises(EOFError, match="huge is not in the file as a whole"):
            read_values(raw, file["huge"])
        with pytest.raises(ValueError, match="texts holds no numbers"):
            read_values(raw, file["texts"])
        with pytest.raises(ValueError, match="x holds no texts"):
            read_texts(raw, file["x"])


# --- locks ---------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_lock_is_named_as_one_and_can_be_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.ones((2, 3), "f4")
    code = (
        "import sys, pathlib, dragn_cache.interop as i\n"
        "print(i.import_features(*map(pathlib.Path, sys.argv[1:])).instances)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "out")]
    with locked(path):
        with pytest.raises(InputError, match="no other program writes, got a lock on it") as caught:
            import_features(path, tmp_path / "out")
        assert "let that program finish" in caught.value.remedy
        assert "remove" not in str(caught.value)
        name, value = caught.value.remedy.partition(" to read")[0].rpartition(" ")[2].split("=")
        done = subprocess.run(
            command, env={**os.environ, name: value}, capture_output=True, text=True, check=True
        )
    assert done.stdout == "2\n"
    assert import_features(path, tmp_path / "again").instances == 2


def test_parts_need_no_lock(store: Store) -> None:
    expected, _ = store.load("gap")
    with locked(store.part_path(0)):
        again = open_store(store.path)
        np.testing.assert_array_equal(again.load("gap")[0], expected)
        assert verify_part(again, 0).bags == ()


# --- written to a disk that refuses --------------------------------------------------------------


def test_wherever_the_disk_refuses_it_is_an_error(tmp_path: Path) -> None:
    numbers = np.arange(30_000, dtype="i8")

    def write(path: Path) -> None:
        with writing_hdf5(path) as (file, check):
            file.create_dataset("texts", data=[f"{k}.png" for k in range(300)], dtype=TEXT)
            file["whole"] = numbers
            chunked = file.create_dataset("chunks", (30_000,), "i8", chunks=(1000,))
            for start in range(0, 30_000, 5000):
                check()
                chunked[start : start + 5000] = numbers[start : start + 5000]
            file.attrs["names"] = ["a", "b"]

    write(tmp_path / "sound.h5")
    size = (tmp_path / "sound.h5").stat().st_size
    for limit in [*range(0, 3000, 300), *range(3000, size, size // 40), size - 1]:
        with file_limit(limit), pytest.raises(OSError, match="File too large"):
            write(tmp_path / f"{limit}.h5")
    with file_limit(size):
        write(tmp_path / "again.h5")
    with h5py.File(tmp_path / "again.h5") as file:
        np.testing.assert_array_equal(file["whole"], file["chunks"])
        assert file["texts"].asstr()[299] == "299.png"


def test_long_work_ends_with_the_first_block_that_the_disk_refuses(tmp_path: Path) -> None:
    written = []

    def write() -> None:
        with writing_hdf5(tmp_path / "a.h5") as (file, check):
            rows = file.create_dataset("x", (100, 1000), "i8")
            for k in range(100):
                check()
                rows[k] = k
                written.append(k)

    with file_limit(20_000), pytest.raises(OSError, match="File too large"):
        write()
    assert written == [0, 1, 2]  # two of 8,000 bytes, and the one that meets the limit


def test_a_file_of_before_gets_more(tmp_path: Path) -> None:
    with writing_hdf5(tmp_path / "a.h5") as (file, _):
        file["x"] = [1, 2, 3]
    with writing_hdf5(tmp_path / "a.h5", "r+") as (file, _):
        file["y"] = [*file["x"][...], 5]
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["y"][...].tolist() == [1, 2, 3, 5]
    with pytest.raises(FileExistsError), writing_hdf5(tmp_path / "a.h5"):
        pass
