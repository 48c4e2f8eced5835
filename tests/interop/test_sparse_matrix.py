"""A sparse X of an AnnData file is believed only as far as its indices fit its shape."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray

from dragn_cache.errors import InputError
from dragn_cache.interop import import_features
from dragn_cache.interop.config import ImportConfig
from dragn_cache.store import open_store

ROWS, COLUMNS = 11, 5
BAGS = list("abacabbacab")
CONFIG = ImportConfig(layout="anndata")


def write(path: Path, kind: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(ROWS, COLUMNS)).astype("f4") * (rng.random((ROWS, COLUMNS)) < 0.5)
    sparse = {"csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix}[kind](values)
    data = anndata.AnnData(sparse)
    data.obs["bag_id"] = BAGS
    data.write_h5ad(path)
    return values


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_sound_ones_are_read(tmp_path: Path, kind: str) -> None:
    values = write(tmp_path / "x.h5ad", kind)
    import_features(tmp_path / "x.h5ad", tmp_path / "s", CONFIG)
    store = open_store(tmp_path / "s")
    for bag_id in "abc":
        rows = [k for k, bag in enumerate(BAGS) if bag == bag_id]
        np.testing.assert_array_equal(store.bag(bag_id, "features"), values[rows])


@pytest.mark.parametrize("kind", ["csr", "csc"])
@pytest.mark.parametrize("place", [0, 7, -1])
@pytest.mark.parametrize("value", [10**9, "first outside", -1, -(2**31)])
def test_an_index_outside_is_refused(
    tmp_path: Path, kind: str, place: int, value: int | str
) -> None:
    path = tmp_path / "x.h5ad"
    write(path, kind)
    minor = COLUMNS if kind == "csr" else ROWS
    index = minor if isinstance(value, str) else value
    with h5py.File(path, "r+") as file:
        file["X/indices"][place] = index
    with pytest.raises(
        InputError, match=rf"X: expected indices from 0 to {minor - 1}, got {index}"
    ):
        import_features(path, tmp_path / "s", CONFIG)


@pytest.mark.parametrize("kind", ["csr", "csc"])
@pytest.mark.parametrize(
    ("place", "value"), [(0, 1), (0, -3), (3, 10**9), (3, -1), (-1, 10**6), (-1, 0)]
)
def test_starts_that_do_not_run_are_refused(
    tmp_path: Path, kind: str, place: int, value: int
) -> None:
    path = tmp_path / "x.h5ad"
    write(path, kind)
    with h5py.File(path, "r+") as file:
        file["X/indptr"][place] = value
    with pytest.raises(InputError, match=r"X: expected indptr that runs from 0 to \d+, got others"):
        import_features(path, tmp_path / "s", CONFIG)


@pytest.mark.parametrize("name", ["data", "indices", "indptr"])
def test_arrays_of_another_length_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.h5ad"
    write(path, "csr")
    with h5py.File(path, "r+") as file:
        short = file["X"][name][:-1]
        del file["X"][name]
        file["X"][name] = short
    with pytest.raises(InputError, match="X: expected indptr that runs"):
        import_features(path, tmp_path / "s", CONFIG)


def test_a_shape_that_is_smaller_than_the_indices_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    write(path, "csr")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [ROWS, 2]
    with pytest.raises(InputError, match="X: expected indices from 0 to 1"):
        import_features(path, tmp_path / "s", CONFIG)
