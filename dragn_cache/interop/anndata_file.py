"""AnnData ``.h5ad``: one row per instance, ``X`` its vector, ``obs`` its bag. Needs ``anndata``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import h5py
import numpy as np

from dragn_cache.errors import InputError
from dragn_cache.files import csv_text, read_text
from dragn_cache.interop.bag_files import require_corners
from dragn_cache.interop.source import (
    TAP,
    UNKNOWN,
    BagFeatures,
    MadeBy,
    Source,
    file_digest,
    make_records,
    manifest_from_tables,
    manifest_from_texts,
    reading,
)
from dragn_cache.interop.target import Target, bags_without_part, encoder_name
from dragn_cache.manifest import Manifest
from dragn_cache.manifest.reading import BAG_COLUMNS, GROUP_COLUMNS, LABEL_COLUMNS
from dragn_cache.manifest.records import BOX_COLUMNS
from dragn_cache.manifest.writing import bags_text
from dragn_cache.store import InstanceRecord, Store, Tap
from dragn_cache.store.hdf5_trial import open_alone
from dragn_cache.store.hdf5_writing import writing_hdf5
from dragn_cache.store.part import Array, corner_coords
from dragn_cache.types import CLEAN_VIEW

if TYPE_CHECKING:
    import pandas as pd


INDEX_BLOCK = 2**20
EXPORT_KEY = "dragn_cache"  # in ``uns``: what an export of this package adds


class AnnDataSource(Source):
    """Rows of ``X`` by the bag that ``obs`` names. ``X`` stays on disk and is read bag by bag."""

    layout = "anndata"

    def __init__(self, path: Path) -> None:
        self.path = path
        anndata = _import_anndata()
        with reading(path, "an AnnData file"):
            with open_alone(path) as file:  # anndata opens it by name
                _require_sound_matrix(path, file)
            self._data = anndata.read_h5ad(path, backed="r")
            self._obs: pd.DataFrame = self._data.obs
        self._export: Mapping[str, Any] = self._data.uns.get(EXPORT_KEY, {})
        column = next((c for c in BAG_COLUMNS if c in self._obs), None)
        if column is None:
            raise InputError(
                str(path),
                expected=f"a column of bag ids in obs, one of {', '.join(BAG_COLUMNS)}",
                got=", ".join(map(str, self._obs.columns)) or "no column",
                remedy="rename the column",
            )
        if self._obs[column].isna().any():
            raise InputError(
                str(path),
                expected=f"a bag id for every row of obs[{column!r}]",
                got=f"none in row {int(self._obs[column].isna().to_numpy().argmax())}",
                remedy="fill it in, or leave the row out",
            )
        bags = self._obs[column].astype(str).to_numpy()
        with reading(path, "the tables of a data set in obs or uns"):
            self.manifest = self._read_manifest()
        self.ids = list(dict.fromkeys([*self._exported_ids(), *bags.tolist()]))
        self._rows = _rows_by_bag(bags)
        self._digest = file_digest(path)

    def _exported_ids(self) -> list[str]:
        """All bags of an export, with those that have no row."""
        return [bag.bag_id for bag in self.manifest.bags] if self._export else []

    def _read_manifest(self) -> Manifest:
        name = self.path.stem
        if self._export:
            return manifest_from_texts(self._export["bags_csv"], self._export["dataset_toml"], name)
        columns = dict.fromkeys((*BAG_COLUMNS, *LABEL_COLUMNS, "split", *GROUP_COLUMNS))
        head = [c for c in columns if c in self._obs]
        cells = ([*row, ""] for row in zip(*(_texts(self._obs[c]) for c in head), strict=True))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{self.path.name}-obs.csv")
            path.write_text(csv_text([*head, "image"], cells), encoding="utf-8", newline="")
            return manifest_from_tables(path, None, name, image_rows=True)

    def read(self, bag_id: str) -> BagFeatures:
        rows = self._rows.get(bag_id, np.empty(0, np.int64))
        with reading(self.path, "an AnnData file"):
            values = _read_rows(self._data.X, rows)
            records = self._records(rows)
        tap = str(self._export.get("tap", TAP))
        made_by = MadeBy(
            str(self._export.get("encoder", UNKNOWN)), self._export.get("features_sha256")
        )
        values_of = {(tap, CLEAN_VIEW): values}
        return BagFeatures(str(self.path), values_of, records, self._digest, made_by)

    def _records(self, rows: Array) -> list[InstanceRecord]:
        """Image, order and box of each row, as far as ``obs`` and ``obsm['spatial']`` say."""
        obs = self._obs.iloc[rows]
        corners = None
        if "spatial" in self._data.obsm:
            spatial = np.asarray(self._data.obsm["spatial"])[rows, :2]
            corners = require_corners(self.path, spatial, len(rows))
        records = make_records(len(rows), self.path.name, self._digest, corners)
        images = obs["image"].astype(str).tolist() if "image" in obs else [""] * len(rows)
        boxes = [record.box for record in records]
        if all(column in obs for column in BOX_COLUMNS):
            x0, y0, x1, y1 = (obs[column].astype(int).tolist() for column in BOX_COLUMNS)
            boxes = list(zip(x0, y0, x1, y1, strict=True))
        orders = obs["order"].astype(int).tolist() if "order" in obs else range(len(rows))
        return [
            InstanceRecord(image or record.image, box, order, record.digest)
            for record, image, box, order in zip(records, images, boxes, orders, strict=True)
        ]


def _texts(column: pd.Series[Any]) -> list[str]:
    """A column's cells as a table has them; empty where a value is missing."""
    missing = column.isna().tolist()
    values = column.astype(object).tolist()
    return ["" if empty else str(v) for empty, v in zip(missing, values, strict=True)]


def _require_sound_matrix(path: Path, file: Any) -> None:
    """Raise `InputError` for a sparse ``X`` whose indices lie outside of its shape.

    Neither anndata nor SciPy looks at them: they would read and write beside the matrix.
    """
    matrix = file.get("X")
    if matrix is None or isinstance(matrix, h5py.Dataset):
        return
    legacy = "h5sparse_format" in matrix.attrs
    kind = matrix.attrs["h5sparse_format" if legacy else "encoding-type"]
    rows, columns = map(int, matrix.attrs["h5sparse_shape" if legacy else "shape"])
    major, minor = (rows, columns) if str(kind).startswith("csr") else (columns, rows)
    data, indices, starts = (matrix[name] for name in ("data", "indices", "indptr"))
    edges = starts[...]
    if (
        edges.dtype.kind not in "iu"
        or edges.shape != (major + 1,)
        or data.shape != indices.shape
        or (edges[0], edges[-1]) != (0, len(indices))
        or (edges[1:] < edges[:-1]).any()
    ):
        raise _bad_matrix(path, f"indptr that runs from 0 to {len(indices)}", "others")
    for start in range(0, len(indices), INDEX_BLOCK):
        block = indices[start : start + INDEX_BLOCK]
        wrong = (block < 0) | (block >= minor)
        if block.dtype.kind not in "iu" or wrong.any():
            got = str(block[wrong][0] if wrong.any() else block.dtype)
            raise _bad_matrix(path, f"indices from 0 to {minor - 1}", got)


def _bad_matrix(path: Path, expected: str, got: str) -> InputError:
    return InputError(f"{path}, X", expected=expected, got=got, remedy="write the file again")


def _rows_by_bag(bags: Array) -> dict[str, Array]:
    order = np.argsort(bags, kind="stable")
    ids, starts = np.unique(bags[order], return_index=True)
    pieces = np.split(order, starts[1:])
    return {str(bag_id): rows for bag_id, rows in zip(ids, pieces, strict=True)}


def _read_rows(matrix: Any, rows: Array) -> Array:
    """Rows of a matrix on disk, dense or sparse, as a dense array; consecutive rows as a slice."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        piece = matrix[int(rows[0]) : int(rows[-1]) + 1]
    else:
        piece = matrix[rows] if len(rows) else matrix[0:0]
    return np.asarray(piece.toarray() if hasattr(piece, "toarray") else piece)


class AnnDataTarget(Target):
    """One ``.h5ad``; writing it takes the memory of the whole ``X``."""

    layout = "anndata"
    is_folder = False
    named_files = False
    holds_maps = False

    def write(self, store: Store, tap: Tap, path: Path, advance: Callable[[], None]) -> None:
        anndata = _import_anndata()
        values, _ = store.load(tap.name)
        obs, spatial = _observations(store, advance)
        export = {
            "bags_csv": bags_text(bags_without_part(store)),
            "dataset_toml": read_text(store.path / "manifest" / "dataset.toml"),
            "store_json": store.description.to_json(),
            "tap": tap.name,
            "encoder": encoder_name(store),
            "features_sha256": store.description.digest("features"),
        }
        data = anndata.AnnData(values, obs=obs, obsm={"spatial": spatial}, uns={EXPORT_KEY: export})
        with writing_hdf5(path) as (file, _):
            anndata.io.write_elem(file, "/", data)


def _observations(store: Store, advance: Callable[[], None]) -> tuple[Any, Array]:
    """The table of instances, and the coords (N, 2)."""
    import pandas as pd

    columns: dict[str, list[Any]] = {"bag_id": [], "image": [], "order": []}
    boxes, spatial = [], []
    for bag in store.bags:
        index = store.instances(bag.bag_id)
        columns["bag_id"] += [bag.bag_id] * index.rows
        columns["image"] += index.images
        columns["order"] += index.order.tolist()
        boxes.append(index.boxes)
        spatial.append(corner_coords(index))
        advance()
    table = pd.DataFrame(columns)
    table[list(BOX_COLUMNS)] = np.concatenate(boxes)
    table.index = pd.Index(
        [f"{b}:{k}" for b, k in zip(columns["bag_id"], columns["order"], strict=True)]
    )
    return table, np.concatenate(spatial)


def _import_anndata() -> Any:
    try:
        import anndata
    except ImportError as error:
        raise InputError(
            "layout anndata",
            expected="the package anndata",
            got="none",
            remedy="pip install 'dragn-cache[anndata]'",
        ) from error
    return cast(Any, anndata)
