"""HDF5 files that show bytes of other files are refused by name, whichever layout they claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest

from dragn_cache.errors import InputError
from dragn_cache.interop import import_features
from dragn_cache.interop.config import ImportConfig
from dragn_cache.store.hdf5_links import own_dataset

WIDTH = 3
Reach = Callable[[Any, str, Path], object]


def external_link(file: Any, name: str, secret: Path) -> None:
    file[name] = h5py.ExternalLink(str(secret), "x")


def soft_link_through_an_external_one(file: Any, name: str, secret: Path) -> None:
    file["elsewhere"] = h5py.ExternalLink(str(secret), "/")
    file[name] = h5py.SoftLink("/elsewhere/x")


def virtual(file: Any, name: str, secret: Path) -> None:
    layout = h5py.VirtualLayout((5, WIDTH), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "x", (5, WIDTH))
    file.create_virtual_dataset(name, layout)


def virtual_of_nothing(file: Any, name: str, secret: Path) -> None:
    virtual(file, name, secret.with_name("missing.h5"))


def external_storage(file: Any, name: str, secret: Path) -> None:
    file.create_dataset(name, (5, WIDTH), "f4", external=[(str(secret), 0, 5 * WIDTH * 4)])


REACHES = [
    (external_link, r"a link to the file .*secret\.h5"),
    (soft_link_through_an_external_one, r"elsewhere, a link to the file .*secret\.h5"),
    (virtual, "a virtual dataset"),
    (virtual_of_nothing, "a virtual dataset"),
    (external_storage, r"stored in the file .*secret\.h5"),
]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.ones((5, WIDTH), "f4")
    return tmp_path / "secret.h5"


@pytest.mark.parametrize("layout", ["clam", "trident", "stamp"])
@pytest.mark.parametrize(("reach", "got"), REACHES)
def test_a_bags_file_that_reaches_out_is_refused(
    tmp_path: Path, secret: Path, layout: str, reach: Reach, got: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    with h5py.File(source / "a.h5", "w") as file:
        reach(file, "feats" if layout == "stamp" else "features", secret)
    config = ImportConfig(layout=layout)
    with pytest.raises(InputError, match=rf"a\.h5: expected a file that holds all .*{got}"):
        import_features(source, tmp_path / "out", config)
    assert not list(tmp_path.glob("out/parts/*"))


@pytest.mark.parametrize("name", ["coords", "deep/inside/of/it"])
@pytest.mark.parametrize(("reach", "got"), REACHES)
def test_so_is_one_that_does_so_elsewhere(
    tmp_path: Path, secret: Path, name: str, reach: Reach, got: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    with h5py.File(source / "a.h5", "w") as file:
        file["features"] = np.ones((5, WIDTH), "f4")
        file["round"] = file["/"]  # a circle of hard links ends
        reach(file, name, secret)
    with pytest.raises(InputError, match=rf"a\.h5: expected a file that holds all .*{got}"):
        import_features(source, tmp_path / "out", ImportConfig(layout="clam"))


@pytest.mark.parametrize(("reach", "got"), REACHES)
def test_so_is_an_anndata_file(tmp_path: Path, secret: Path, reach: Reach, got: str) -> None:
    path = tmp_path / "a.h5ad"
    data = anndata.AnnData(np.ones((5, WIDTH), "f4"))
    data.obs["bag_id"] = list("aabbb")
    data.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        reach(file, "X", secret)
    with pytest.raises(InputError, match=rf"a\.h5ad: expected a file that holds all .*{got}"):
        import_features(path, tmp_path / "out", ImportConfig(layout="anndata"))


@pytest.mark.parametrize(("reach", "got"), REACHES)
def test_so_is_a_whole_store_in_one_file(
    tmp_path: Path, secret: Path, reach: Reach, got: str
) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["taps/gap/0"] = np.ones((5, WIDTH), "f4")
        for name in ("store_json", "dataset_toml"):
            file.create_dataset(f"store/{name}", data=["x"], dtype=h5py.string_dtype())
        reach(file, "store/bags_csv", secret)
    with pytest.raises(InputError, match=rf"a\.h5: expected a file that holds all .*{got}"):
        import_features(path, tmp_path / "out", ImportConfig(layout="hdf5"))


def test_a_taps_name_that_leads_out_of_a_part_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    np.save(source / "a.npy", np.ones((5, WIDTH), "f4"))
    (source / "provenance.json").write_text('{"tap": "../../elsewhere"}')
    with pytest.raises(InputError, match=r"a\.npy: expected a tap's name without slashes, got"):
        import_features(source, tmp_path / "out", ImportConfig(layout="npy", format="zarr"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("reach", "got"), REACHES)
def test_a_part_that_reaches_out_is_damaged(
    tmp_path: Path, secret: Path, reach: Reach, got: str
) -> None:
    with h5py.File(tmp_path / "part.h5", "w") as file:
        file["bags/id"] = [1, 2]
        file["bags/real"] = h5py.SoftLink("/bags/id")
        reach(file, "bags/offsets", secret)
    with h5py.File(tmp_path / "part.h5", "r") as file:
        np.testing.assert_array_equal(own_dataset(file, "bags/id")[...], [1, 2])
        with pytest.raises(ValueError, match=r"bags/offsets is (behind a link|a virt|stored in)"):
            own_dataset(file, "bags/offsets")
        with pytest.raises(ValueError, match="bags/real is behind a link"):
            own_dataset(file, "bags/real")
        with pytest.raises(ValueError, match="bags is no dataset"):
            own_dataset(file, "bags")
        with pytest.raises(KeyError):
            own_dataset(file, "bags/none")
