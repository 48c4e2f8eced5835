"""Files: only regular ones are opened, within limits, and by way of one module."""

from __future__ import annotations

import ast
import errno
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dragn_cache import files
from dragn_cache.backbones.weights import read_state_dict
from dragn_cache.errors import InputError, StoreError, WeightsError
from dragn_cache.extraction.update import digest_files
from dragn_cache.interop.anndata_file import AnnDataSource
from dragn_cache.interop.bag_files import BagFiles
from dragn_cache.interop.h5_files import ClamSource
from dragn_cache.interop.npy_files import NpySource
from dragn_cache.interop.npz_file import NpzSource
from dragn_cache.interop.tensor_files import TensorSource
from dragn_cache.interop.whole_file import Hdf5Source
from dragn_cache.layers import read_settings
from dragn_cache.loading.label_masks import read_stage_table
from dragn_cache.manifest.dataset_toml import read_toml
from dragn_cache.manifest.tables import read_table
from dragn_cache.store import FORMATS
from dragn_cache.store.schema import read_description

LIBRARY = Path(files.__file__).parent

Opener = Callable[[Path], object]


def of_bag(source: type[BagFiles]) -> Opener:
    return lambda path: source.read_file(source.__new__(source), path)


OPENERS: dict[str, Opener] = {
    "a table": read_table,
    "a table of stages": read_stage_table,
    "dataset.toml": read_toml,
    "settings": read_settings,
    "weights": read_state_dict,
    "npz": NpzSource,
    "npy": of_bag(NpySource),
    "pt": of_bag(TensorSource),
    "h5 of a bag": of_bag(ClamSource),
    "h5 of a store": Hdf5Source,
    "h5ad": AnnDataSource,
    "a part": lambda path: FORMATS["hdf5"].read_index(path),
}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("kind", OPENERS)
@pytest.mark.parametrize("device", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_refused(tmp_path: Path, kind: str, device: str) -> None:
    path = tmp_path / "x.h5"
    if device == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(device)
    with pytest.raises((InputError, WeightsError, OSError), match="a pipe, socket or device") as e:
        OPENERS[kind](path)
    assert "copy what it gives into a file" in str(e.value)


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_within_a_store_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "store.json")
    with pytest.raises(StoreError, match="a pipe, socket or device"):
        read_description(tmp_path)
    array = tmp_path / "00000.zarr" / "instances" / "order"
    array.mkdir(parents=True)
    os.mkfifo(array / "zarr.json")
    for read in (FORMATS["zarr"].read_index, FORMATS["zarr"].read_bags):
        with pytest.raises(OSError, match="a pipe, socket or device"):
            read(array.parents[1])
    assert digest_files([tmp_path / "store.json"]) is None


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def test_texts_and_tables_above_their_limit_are_not_read(tmp_path: Path) -> None:
    text = sparse(tmp_path / "large.toml", files.MOST_TEXT_BYTES + 1)
    for opener in (read_toml, read_settings):
        with pytest.raises(InputError, match=r"17 MB, more than the 17 MB that such a file may"):
            opener(text)
    table = sparse(tmp_path / "large.csv", 3 * 10**12)
    with pytest.raises(InputError, match=r"3000000 MB, more than the 1074 MB"):
        read_table(table)


def test_a_file_without_a_size_is_read_up_to_the_limit(tmp_path: Path) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")
    assert status.stat().st_size == 0
    assert files.read_limited(status).startswith(b"Name:")
    with pytest.raises(OSError, match="more than the") as error:
        files.read_limited(status, 10)
    assert error.value.errno == errno.EFBIG


def test_an_archive_larger_than_memory_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz, pt = tmp_path / "bomb.npz", tmp_path / "bomb.pt"
    np.savez_compressed(npz, features=np.zeros((1000, 1000)))
    torch.save({"features": torch.zeros(1000, 1000)}, pt)
    assert npz.stat().st_size < 10**5
    monkeypatch.setattr(files, "free_memory", lambda: 10**6)
    with pytest.raises(InputError, match=r"need more memory than there is \(0\.008 GB, more"):
        NpzSource(npz)
    with pytest.raises(MemoryError, match=r"more than the 0\.001 GB of free memory"):
        files.require_sound_archive(pt)


def test_a_dataset_that_is_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    """Four kilobytes of file, which would be 20 TB of the fill value."""
    path = tmp_path / "bag.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (10**8, 50_000), "f4", chunks=(1000, 1000))
    assert path.stat().st_size < 10_000
    with pytest.raises(MemoryError, match=r"2e\+04 GB, more than"):
        OPENERS["h5 of a bag"](path)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"0123456789")
    data = path.read_bytes().replace(b"0123456789", b"0123456780")
    path.write_bytes(data)
    with pytest.raises(zipfile.BadZipFile, match="other bytes than were written in a"):
        files.require_sound_archive(path)


# --- every opener passes there -------------------------------------------------------------------

LIBRARIES = {"np.load", "np.fromfile", "torch.load", "h5py.File", "zarr.open_group", "open"}
LIBRARIES |= {"anndata.read_h5ad", "zipfile.ZipFile", "zipfile.is_zipfile", "hashlib.file_digest"}
CHECKS = {"require_regular", "require_regular_below", "require_sound_archive", "open_regular"}
CHECKS |= {"open_part", "open_alone", "_read_bytes"}
# Of the system, or written by this process itself.
OTHERS = {
    "aggregators/recursion/library.py": "its own source, and /proc",
    "machine.py": "/proc and /sys",
    "demo.py": "what the demo has just written",
    "store/claims.py:started": "/proc",
    "store/hdf5_trial.py:_address_space": "/proc",
    "store/hdf5_trial.py:_answer": "in another process, after the check of try_reading",
    "store/hdf5_writing.py:writing_hdf5": "what is being written",
    "store/tables.py:write_tables": "what it has just written beside",
    "images/decode.py": "images, whose own check comes first in read_picture",
    "images/tiff_parts.py": "bytes in memory",
}


def test_every_function_that_opens_a_file_checks_it() -> None:
    unchecked = []
    for path in sorted(LIBRARY.rglob("*.py")):
        name = str(path.relative_to(LIBRARY))
        if name in OTHERS or name == "files.py":
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef) and f"{name}:{function.name}" not in OTHERS:
                calls = list(called(function))
                reads = [call for call in calls if reads_a_file(call)]
                if reads and not CHECKS & {called_name(call) for call in calls}:
                    unchecked.append(f"{name}:{reads[0].lineno} {function.name}")
    assert unchecked == []


def called(function: ast.FunctionDef) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))


def called_name(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def reads_a_file(call: ast.Call) -> bool:
    """Whether a call may open a file that exists; not those that write, or take bytes in memory."""
    name = ast.unparse(call.func)
    method = name.endswith((".read_text", ".read_bytes", ".open"))
    if not method and name not in LIBRARIES:
        return False
    values = [*call.args, *(k.value for k in call.keywords)]
    writes = {"w", "wb", "x", "xb", "a", "r+"} & {
        v.value for v in values if isinstance(v, ast.Constant)
    }
    return not writes and not name.startswith(("os.", "h5py.h5o."))


def test_a_folder_goes_while_another_thread_still_writes_to_it(tmp_path: Path) -> None:
    """As Zarr's threads do after one of them has met a full disk."""
    folder, stop = tmp_path / "scratch", time.monotonic() + 0.3
    folder.mkdir()

    def write() -> None:
        number = 0
        with suppress(FileNotFoundError):
            while time.monotonic() < stop:
                number += 1
                (folder / str(number)).touch()

    with ThreadPoolExecutor(1) as others:
        others.submit(write)
        files.remove_tree(folder)
        assert not folder.exists()
