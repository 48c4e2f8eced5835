"""Where bytes of others come in: whatever a parser raises, the error is one that names the file."""

from __future__ import annotations

import json
import pickle
import pwd
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import write_dataset
from run_stores import make_bags, make_features, write_store

from dragn_cache.errors import (
    DragnCacheError,
    InputError,
    SettingError,
    StoreError,
    foreign,
    reason,
)
from dragn_cache.interop.importing import import_features
from dragn_cache.layers import read_settings
from dragn_cache.manifest import read_manifest
from dragn_cache.manifest.shipped import data_folder
from dragn_cache.manifest.tables import split_cell
from dragn_cache.runs.checkpoint import load_checkpoint
from dragn_cache.store import json_digest, open_store
from dragn_cache.studies.folder import read_config, read_training
from dragn_cache.training.config import TrainConfig

DEEP = 100_000  # brackets: more than any parser follows


@dataclass(frozen=True)
class Boundary:
    """A file that cannot be right, written below a folder, and the call that reads it.

    Attributes:
        write: writes the file; gives its path.
        read: reads it, given its path and the folder.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path, Path], object]


def text_file(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def small_store(folder: Path) -> Path:
    bags = make_bags(5)
    return write_store(folder / "store", bags, make_features(bags)).path


def zarr_store(folder: Path) -> Path:
    """A store of Zarr parts whose first tap has chunks of no row."""
    from dragn_cache.interop import export_features

    export_features(open_store(small_store(folder)), folder / "whole", layout="zarr")
    path = folder / "whole" / "taps" / "layer4" / "0" / "zarr.json"
    record = json.loads(path.read_text())
    record["codecs"][0]["configuration"]["chunk_shape"][0] = 0
    path.write_text(json.dumps(record))
    return folder / "whole"


def described(**fields: Any) -> Callable[[Path], Path]:
    """A store whose store.json has other fields, under digests of their own."""

    def write(folder: Path) -> Path:
        path = small_store(folder) / "store.json"
        record = json.loads(path.read_text()) | fields
        digests = record["digests"]
        if isinstance(record["provenance"], dict):
            digests |= {k: json_digest(v) for k, v in record["provenance"].items()}
        del digests["file"]
        digests["file"] = json_digest(record)
        path.write_text(json.dumps(record))
        return path

    return write


def nested_description(folder: Path) -> Path:
    path = small_store(folder) / "store.json"
    path.write_text("[" * DEEP)
    return path


def table_of_store(text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = small_store(folder) / "manifest" / "dataset.toml"
        path.write_bytes(text.encode("latin-1"))
        return path

    return write


def part_number(folder: Path) -> Path:
    path = small_store(folder) / "manifest" / "bags.csv"
    head, first, *rest = path.read_text().splitlines()
    cells = first.split(",")
    cells[head.split(",").index("part")] = "²"
    path.write_text("\n".join([head, ",".join(cells), *rest]) + "\n")
    return path


def archive(name: str, **arrays: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / name, **arrays)
        return folder / name

    return write


def five_bytes(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x80\x02.ab")  # an unpickler takes from an empty stack
        return path

    return write


def saved(name: str, value: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        torch.save(value, path)
        return path

    return write


def scalar_h5(folder: Path) -> Path:
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.float32(1)
        file["coords"] = np.zeros((1, 2))
    return path


def bad_attribute(folder: Path) -> Path:
    path = folder / "features_net" / "a.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 2), np.float32)
        file["features"].attrs["encoder"] = np.bytes_(b"\xff\xfe")
    return path


def annotated(folder: Path) -> Path:
    import anndata
    import pandas as pd

    path = folder / "a.h5ad"
    obs = pd.DataFrame({"bag_id": ["a", "b"]}, index=["0", "1"])
    anndata.AnnData(np.zeros((2, 3), np.float32), obs=obs, uns={"dragn_cache": 3}).write_h5ad(path)
    return path


def import_it(path: Path, folder: Path) -> object:
    return import_features(path, folder / "out")


def of_run(path: Path, folder: Path) -> object:
    return load_checkpoint(path.parent)


def open_it(path: Path, folder: Path) -> object:
    return open_store(folder / "store")


BOUNDARIES = {
    "toml of settings": Boundary(
        text_file("a.toml", "a = " + "[" * DEEP), lambda path, _: read_settings(path)
    ),
    "toml of a data set": Boundary(
        lambda folder: text_file("d/dataset.toml", "a = " + "[" * DEEP)(
            write_dataset(folder / "d", [1]).parent
        ),
        lambda path, _: read_manifest(path.parent),
    ),
    "toml of a store": Boundary(table_of_store("name = '\xff'"), open_it),
    "toml of a study": Boundary(
        text_file("c/config.toml", "a = " + "[" * DEEP), lambda path, _: read_config(path.parent)
    ),
    "json of a study": Boundary(
        text_file("trainings/a/seed0-fold0.json", "[" * DEEP),
        lambda path, folder: read_training(folder, ("a", 0, 0)),
    ),
    "json of a store": Boundary(nested_description, open_it),
    "made_from": Boundary(described(made_from=None), open_it),
    "views": Boundary(described(views=["0", "../x"]), open_it),
    "provenance": Boundary(described(provenance=[]), open_it),
    "revision": Boundary(described(revision="1"), open_it),
    "taps": Boundary(
        described(taps=[{"name": "gap", "shape": [2**63], "dtype": "float16"}]), open_it
    ),
    "table of a store": Boundary(part_number, open_it),
    "zarr": Boundary(zarr_store, lambda path, folder: import_features(path, folder / "out", None)),
    "npz": Boundary(
        archive("a.npz", features=np.float32(1), offsets=np.zeros(2, int), bag_ids=["a"]),
        import_it,
    ),
    "npz of other labels": Boundary(
        archive(
            "a.npz",
            features=np.zeros((1, 2), np.float32),
            offsets=np.array([0, 1]),
            bag_ids=["a"],
            targets=np.zeros((1, 1), int),
            labels=[["x", "y"]],
        ),
        import_it,
    ),
    "pt": Boundary(five_bytes("a.pt"), import_it),
    "pt of sparse rows": Boundary(saved("a.pt", torch.eye(3).to_sparse()), import_it),
    "h5": Boundary(scalar_h5, import_it),
    "h5 of bad text": Boundary(bad_attribute, import_it),
    "h5ad": Boundary(annotated, import_it),
    "checkpoint": Boundary(five_bytes("r/checkpoint.pt"), of_run),
    "checkpoint of a list": Boundary(saved("r/checkpoint.pt", [1]), of_run),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", list(BOUNDARIES))
def test_every_error_of_a_parser_names_the_file(name: str, tmp_path: Path) -> None:
    boundary = BOUNDARIES[name]
    path = boundary.write(tmp_path)
    with pytest.raises(DragnCacheError, match=path.name):
        boundary.read(path, tmp_path)


# --- the wrapper --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "got"),
    [
        (IndexError("out of range"), "out of range"),
        (KeyError("x"), "nothing named 'x'"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (RecursionError("maximum"), "values nested too deeply to be read"),
        (MemoryError(), "contents that need more memory than there is"),
        (zipfile.BadZipFile("two\nlines"), "two"),
        (pickle.UnpicklingError("x" * 1000), "x" * 299 + "…"),
    ],
)
def test_any_error_becomes_one_that_names_the_file(error: Exception, got: str) -> None:
    with (
        pytest.raises(StoreError) as raised,
        foreign(Path("a.b"), expected="c", remedy="d", kind=StoreError),
    ):
        raise error
    assert str(raised.value) == f"a.b: expected c, got {got}; d"
    assert raised.value.__cause__ is error
    assert reason(error) == got


def test_errors_of_ours_and_interruptions_pass_a_boundary() -> None:
    ours = InputError("x", expected="y", got="z", remedy="w")
    for error in (ours, KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, foreign("a", expected="b", remedy="c"):
            raise error
        assert raised.value is error


# --- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        "[" * 5000 + "]" * 5000,
        "[{[]: 1}]",
        "[1" + "0" * 5000 + "]",
        "[0x1" + "0" * 5000 + "]",  # a number that Python reads and does not write
    ],
)
def test_a_cell_that_only_looks_like_a_list_is_a_text(cell: str) -> None:
    assert split_cell(cell) == (cell,)


def table(folder: Path, name: str, rows: Mapping[str, str]) -> None:
    path = write_dataset(folder, [1, 1]) / name
    text = path.read_text()
    for old, new in rows.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.parametrize(("file", "old"), [("bags.csv", "000,"), ("instances.csv", "img/000_0")])
def test_a_null_character_is_a_fault_of_its_line(file: str, old: str, tmp_path: Path) -> None:
    table(tmp_path / "d", file, {old: old.replace("00", "0\0")})
    with pytest.raises(DragnCacheError, match=rf"{file}:2.*\\x00"):
        read_manifest(tmp_path / "d")


def test_a_folder_of_other_bytes_is_a_fault(tmp_path: Path) -> None:
    image = next((write_dataset(tmp_path / "d", [1]) / "img").iterdir())
    odd = tmp_path / "images" / "bag" / "\udcff.png"
    odd.parent.mkdir(parents=True)
    odd.write_bytes(image.read_bytes())
    (tmp_path / "images" / "labels.csv").write_text("bag_id,labels\nbag,actin\n")
    with pytest.raises(DragnCacheError, match=r"'bag/\\udcff.png': .*expected a name in UTF-8"):
        read_manifest(tmp_path / "images")


def test_a_bag_file_of_other_bytes_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "\udcff.npy", np.zeros((2, 3), np.float32))
    with pytest.raises(InputError, match=r"udcff.npy': expected a name in UTF-8"):
        import_features(tmp_path, tmp_path / "out")


def test_an_id_with_a_null_character_begins_no_store(tmp_path: Path) -> None:
    features = np.zeros((1, 2), np.float32)
    offsets = np.array([0, 1])
    np.savez(tmp_path / "a.npz", features=features, offsets=offsets, bag_ids=["a\0b"])
    with pytest.raises(InputError, match=r"a.npz, bag 'a\\x00b', bag_id: .* a null character"):
        import_features(tmp_path / "a.npz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- settings -----------------------------------------------------------------------------------


def test_a_seed_of_more_bits_than_torch_takes_is_refused() -> None:
    torch.manual_seed(TrainConfig(seed=2**63 - 1).seed)
    for seed in (2**63, 2**64):
        with pytest.raises(SettingError, match=f"seed: .*9223372036854775807, got {seed}"):
            TrainConfig(seed=seed)
        with pytest.raises(SettingError, match="seed"):
            TrainConfig(shuffle_seed=seed)


def test_a_user_without_name_and_home_has_a_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> object:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("DRAGN_CACHE_DATA", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    assert data_folder() == Path("~/.local/share/dragn-cache")
