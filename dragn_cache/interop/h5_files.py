"""One ``.h5`` per bag: CLAM and TRIDENT (``features``, ``coords``) and STAMP (``feats``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dragn_cache.errors import InputError
from dragn_cache.files import csv_text
from dragn_cache.interop.bag_files import BagFiles, FileFeatures
from dragn_cache.interop.source import UNKNOWN, MadeBy
from dragn_cache.interop.target import (
    ExportedBag,
    Target,
    encoder_name,
    exported_bags,
    write_tables,
)
from dragn_cache.interop.tensor_files import write_tensor
from dragn_cache.manifest import Bag
from dragn_cache.store import Store, Tap, json_digest
from dragn_cache.store.hdf5_trial import open_alone, read_whole
from dragn_cache.store.hdf5_writing import writing_hdf5
from dragn_cache.store.part import Array

CHUNK_BYTES = 256 * 2**10


class _H5Files(BagFiles):
    suffix = ".h5"
    dataset: ClassVar[str] = "features"

    def read_file(self, path: Path) -> FileFeatures:
        with open_alone(path) as file:
            values = read_whole(file[self.dataset])
            corners = read_whole(file["coords"]) if "coords" in file else None
            return self.describe(file, values, corners)

    def describe(self, file: Any, values: Array, corners: Array | None) -> FileFeatures:
        """The two arrays with what the layout's attributes say about them."""
        return FileFeatures(values, corners)


class ClamSource(_H5Files):
    """A CLAM tree: ``h5_files/BAG.h5`` (its ``pt_files/`` hold the same features)."""

    layout = "clam"
    folder_name = "h5_files"


class TridentSource(_H5Files):
    """TRIDENT's ``features_ENCODER/BAG.h5``, with the encoder in the attributes of ``features``."""

    layout = "trident"

    def find_folder(self, path: Path) -> Path:
        if path.is_file() or path.name.startswith("features_"):
            return path
        folders = sorted(p for p in path.rglob("features_*") if p.is_dir())
        if len(folders) > 1:
            raise InputError(
                str(path),
                expected="one folder features_ENCODER",
                got=", ".join(str(p.relative_to(path)) for p in folders),
                remedy="give one of them as the source",
            )
        return folders[0] if folders else path

    def describe(self, file: Any, values: Array, corners: Array | None) -> FileFeatures:
        encoder = _text(file[self.dataset].attrs.get("encoder", UNKNOWN))
        extent = file["coords"].attrs.get("patch_size_level0", 0) if corners is not None else 0
        return FileFeatures(values, corners, int(extent), MadeBy(encoder))


class StampSource(_H5Files):
    """STAMP's ``feats``; coordinates in µm become pixels of its tiles."""

    layout = "stamp"
    dataset = "feats"

    def describe(self, file: Any, values: Array, corners: Array | None) -> FileFeatures:
        facts = {key: _text(value) for key, value in file.attrs.items()}
        extent_px = float(facts.get("tile_size_px", 0))
        extent_um = float(facts.get("tile_size_um", 0))
        if corners is not None and facts.get("unit") == "um" and extent_px and extent_um:
            corners = corners.astype(np.float64) * (extent_px / extent_um)
        return FileFeatures(values, corners, round(extent_px), _made_by_stamp(facts))


def _made_by_stamp(facts: Mapping[str, str]) -> MadeBy:
    """The extractor, and a digest of the settings that STAMP's attributes give."""
    known = ("extractor", "code_hash", "unit", "tile_size_um", "tile_size_px")
    settings = {key: facts[key] for key in known if key in facts}
    encoder = settings.get("extractor", UNKNOWN)
    return MadeBy(encoder, json_digest(settings) if settings else None)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# --- writing -----------------------------------------------------------------------------------


class ClamTarget(Target):
    """A CLAM tree: ``h5_files/`` and ``pt_files/``, and ``slides.csv`` with CLAM's column names."""

    layout = "clam"

    def write(self, store: Store, tap: Tap, path: Path, advance: Callable[[], None]) -> None:
        for name in ("h5_files", "pt_files"):
            path.joinpath(name).mkdir(parents=True)
        for exported in exported_bags(store, tap):
            bag_id = exported.bag.bag_id
            with writing_hdf5(path / "h5_files" / f"{bag_id}.h5") as (file, _):
                write_arrays(file, exported)
            write_tensor(path / "pt_files" / f"{bag_id}.pt", exported.values)
            advance()
        write_tables(store, tap, path)
        slides = csv_text(["case_id", "slide_id", "label"], map(_slide_row, store.bags))
        path.joinpath("slides.csv").write_text(slides, encoding="utf-8", newline="")


def _slide_row(bag: Bag) -> list[str]:
    return [bag.group or bag.bag_id, bag.bag_id, ";".join(bag.labels or ())]


class TridentTarget(Target):
    """``features_ENCODER/BAG.h5`` with TRIDENT's attributes."""

    layout = "trident"

    def write(self, store: Store, tap: Tap, path: Path, advance: Callable[[], None]) -> None:
        encoder = encoder_name(store)
        folder = path / f"features_{re.sub(r'[^A-Za-z0-9_.-]+', '_', encoder)}"
        folder.mkdir(parents=True)
        for exported in exported_bags(store, tap):
            with writing_hdf5(folder / f"{exported.bag.bag_id}.h5") as (file, _):
                write_arrays(file, exported)
                file["features"].attrs.update(name=exported.bag.bag_id, encoder=encoder)
                extent = square_extent(exported)
                if extent:
                    file["coords"].attrs["patch_size_level0"] = extent
            advance()
        write_tables(store, tap, path)


def write_arrays(file: Any, exported: ExportedBag) -> None:
    """Write ``features`` and ``coords``; in chunks where the rows are more than one chunk."""
    row_bytes = exported.values[:1].nbytes or 1
    chunk = -(-CHUNK_BYTES // row_bytes)
    rows, *shape = exported.values.shape
    chunks = (chunk, *shape) if rows > chunk else None
    file.create_dataset("features", data=exported.values, chunks=chunks)
    file.create_dataset("coords", data=exported.coords)


def square_extent(exported: ExportedBag) -> int:
    """Width and height of all boxes if they are squares of one size, else 0."""
    extents = np.unique(exported.index.boxes[:, 2:] - exported.index.boxes[:, :2])
    return int(extents[0]) if len(extents) == 1 else 0
