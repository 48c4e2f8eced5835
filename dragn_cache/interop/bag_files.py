"""Layouts with one file per bag, named after it: finding the files and reading one at a time."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dragn_cache.errors import InputError
from dragn_cache.files import is_storable, read_text
from dragn_cache.interop.source import (
    TAP,
    UNKNOWN,
    BagFeatures,
    MadeBy,
    Source,
    bare_manifest,
    file_digest,
    make_records,
    manifest_from_tables,
    reading,
)
from dragn_cache.manifest import Manifest
from dragn_cache.store.part import Array
from dragn_cache.types import CLEAN_VIEW

TABLE, DESCRIPTION, PROVENANCE = "bags.csv", "dataset.toml", "provenance.json"


@dataclass(frozen=True)
class FileFeatures:
    """The contents of one file.

    Attributes:
        values: the features, in the file's shape and type.
        corners: (n, 2), x and y of each row, or None.
        extent_px: width and height of a row's box, 0 if unknown.
    """

    values: Array
    corners: Array | None = None
    extent_px: int = 0
    made_by: MadeBy = field(default_factory=MadeBy)


class BagFiles(Source):
    """One file per bag. A folder that this package exported also has its tables and provenance."""

    suffix: ClassVar[str]
    folder_name: ClassVar[str] = ""  # the sub-folder that holds the files, if the layout has one

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = find_bag_files(self.find_folder(path), self.suffix)
        self.ids = list(self._files)
        self.manifest = self._read_tables()
        self._export = _read_provenance(path / PROVENANCE)

    def find_folder(self, path: Path) -> Path:
        """The folder with the files below a source's path (or the one file itself)."""
        inner = path / self.folder_name
        return inner if inner.is_dir() else path

    def _read_tables(self) -> Manifest:
        if (self.path / TABLE).is_file():
            return manifest_from_tables(self.path / TABLE, self.path / DESCRIPTION, self.path.name)
        return bare_manifest(self.path.name, self.ids)

    @abstractmethod
    def read_file(self, path: Path) -> FileFeatures:
        """Read one file whole."""

    def file_digest(self, path: Path) -> bytes:
        """sha256 of everything that a bag's features and places are read from."""
        return file_digest(path)

    def read(self, bag_id: str) -> BagFeatures:
        path = self._files[bag_id]
        with reading(path, f"a whole {self.layout} file"):
            content = self.read_file(path)
        values = content.values[0] if _is_wrapped(content.values) else content.values
        count = len(values) if values.ndim else 0
        corners = require_corners(path, content.corners, count)
        digest = self.file_digest(path)
        records = make_records(count, path.name, digest, corners, content.extent_px)
        tap = self._export.get("tap", TAP)
        made_by = content.made_by
        if self._export:
            made_by = MadeBy(
                self._export.get("encoder", UNKNOWN), self._export.get("features_sha256")
            )
        return BagFeatures(str(path), {(tap, CLEAN_VIEW): values}, records, digest, made_by)


def find_bag_files(folder: Path, suffix: str) -> dict[str, Path]:
    """Bag id → file, below a folder, sorted by id, without hidden files.

    Raises:
        InputError: there is none, two have the same name, or another program still writes one.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob(f"*{suffix}"))
    file_of: dict[str, Path] = {}
    for file in files:
        inside = file.relative_to(folder).parts
        if any(part.startswith(".") for part in inside) or not file.is_file():
            continue
        bag_id = file.name.removesuffix(suffix)
        if not is_storable(bag_id):
            raise InputError(
                ascii(str(file)),
                expected="a name in UTF-8",
                got="other bytes",
                remedy="rename the file",
            )
        if bag_id in file_of:
            raise InputError(
                str(file),
                expected="one file per bag",
                got=f"bag {bag_id!r} also in {file_of[bag_id]}",
                remedy="remove or rename one of them",
            )
        _require_unlocked(file)
        file_of[bag_id] = file
    if not file_of:
        raise InputError(
            str(folder),
            expected=f"files named BAG{suffix}",
            got="none" if folder.exists() else "no such folder",
            remedy="correct the path, or give `layout`",
        )
    return {bag_id: file_of[bag_id] for bag_id in sorted(file_of)}


def _require_unlocked(file: Path) -> None:
    lock = file.with_name(file.name + ".lock")
    if lock.exists():
        raise InputError(
            str(file),
            expected="a finished file",
            got=f"a lock beside it, {lock.name}",
            remedy="let the program that writes it finish; if it is dead, make the file again",
        )


def _is_wrapped(values: Array) -> bool:
    """Whether an array is (1, n, D): a bag as a batch of one."""
    return values.ndim == 3 and values.shape[0] == 1


def require_corners(path: Path, corners: Array | None, count: int) -> Array | None:
    """Corners as (n, 2) whole numbers; raise `InputError` if they are not."""
    if corners is None:
        return None
    if _is_wrapped(corners):
        corners = corners[0]
    numbers = corners.dtype.kind in "fiu"
    if corners.shape != (count, 2) or not numbers or not np.isfinite(corners).all():
        raise InputError(
            str(path),
            expected=f"coords of shape {(count, 2)}, one row for each of the features",
            got=f"{corners.dtype} {corners.shape}",
            remedy="make the file again",
        )
    return np.rint(corners).astype(np.int64)


def _read_provenance(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with reading(path, "the provenance that an export wrote"):
        record = json.loads(read_text(path))
        if not isinstance(record, dict):
            raise TypeError("no object")
        return record


def join_rows(arrays: Sequence[Array]) -> Array:
    """A list of arrays as one: vectors and maps are stacked, tables (n, D) concatenated."""
    return np.concatenate(arrays) if arrays[0].ndim == 2 else np.stack(arrays)
