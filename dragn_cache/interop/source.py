"""Sources: layouts to import, which give their bags and one bag's features at a time.

A source is opened without reading features. `Source.read` gives one bag exactly as the files have
it; `row_values` and `stored_values` then decide, in one place, what a store takes.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dragn_cache.errors import InputError, foreign
from dragn_cache.files import file_sha256
from dragn_cache.manifest import Bag, Manifest, read_bags
from dragn_cache.manifest.dataset_toml import read_toml
from dragn_cache.store import Failure, InstanceRecord
from dragn_cache.store.config import DType
from dragn_cache.store.part import Array
from dragn_cache.types import CLEAN_VIEW

TAP = "features"  # the tap's name where a layout has none
UNKNOWN = "unknown"


@dataclass(frozen=True)
class MadeBy:
    """The network of a source's features, and a digest of its settings, as far as known."""

    encoder: str = UNKNOWN
    sha256: str | None = None


@dataclass(frozen=True)
class BagFeatures:
    """One bag as it is in its source.

    Attributes:
        where: the file, for messages.
        values: (tap, view) → array of n rows, in the source's shape and type.
        records: n of them: image, box and order of each row.
        digest: sha256 of the bytes that the bag is read from.
        failures: inputs of the bag that the source records as not used.
    """

    where: str
    values: Mapping[tuple[str, str], Array]
    records: Sequence[InstanceRecord]
    digest: bytes
    made_by: MadeBy
    failures: Sequence[Failure] = ()


class Source(ABC):
    """Features in another layout.

    Attributes:
        path: the file or folder that was opened.
        ids: all bags with features, in the source's order.
        manifest: the bags with the labels, splits and groups that the layout holds.
        views: names of the views, the clean one first.
        features: the *features* provenance, copied as a whole where the layout stores it.
        numerics: the *numerics* provenance, likewise.
    """

    layout: ClassVar[str]
    path: Path
    ids: Sequence[str]
    manifest: Manifest
    views: tuple[str, ...] = (CLEAN_VIEW,)
    features: Mapping[str, Any] | None = None
    numerics: Mapping[str, Any] | None = None

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open a source; raise `InputError` if it is not of this layout."""

    @abstractmethod
    def read(self, bag_id: str) -> BagFeatures:
        """One bag's features; raise `InputError` naming the file if they cannot be read."""


# --- values as a store takes them ---------------------------------------------------------------


def row_values(where: str, values: Array) -> Array:
    """Features as (n, D) or (n, C, h, w): (1, n, D) and (n, C, 1, 1) are squeezed."""
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 4 and values.shape[2:] == (1, 1):
        values = values[:, :, 0, 0]
    if values.ndim not in (2, 4) or 0 in values.shape[1:]:
        raise InputError(
            where,
            expected="features of shape (N, D), (1, N, D) or (N, C, h, w)",
            got=str(values.shape),
            remedy="leave this file out, or bring it into that shape",
        )
    return values


def exact_dtype(where: str, values: Array) -> DType:
    """The type that holds every value exactly: float16 or float32; other types if they fit."""
    if values.dtype.kind == "f" and values.dtype.itemsize == 2:
        return "float16"
    if values.dtype.kind == "f" and values.dtype.itemsize == 4:
        return "float32"
    require_numbers(where, values)
    with np.errstate(over="ignore"):
        same = (values.astype(np.float32) == values) | ~np.isfinite(values)
    if same.all():
        return "float32"
    raise InputError(
        where,
        expected="values that float32 holds exactly",
        got=f"{values.dtype} with {values[~same].flat[0]!r}",
        remedy="give `dtype=float32` to have them rounded",
    )


def require_numbers(where: str, values: Array) -> None:
    """Raise unless an array holds real numbers."""
    if values.dtype.kind not in "fiu":
        raise InputError(
            where, expected="numbers", got=f"type {values.dtype}", remedy="leave this file out"
        )


def stored_values(where: str, bag_id: str, values: Array, dtype: DType) -> Array:
    """Values in the store's type, all of them finite."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype, copy=False)
    finite = np.isfinite(stored)
    if finite.all():
        return stored
    value = values[~finite].flat[0]
    raise InputError(
        f"{where}, bag {bag_id!r}",
        expected=f"finite values up to {np.finfo(dtype).max:g} ({dtype})",
        got=f"{value:g}",
        remedy="use `dtype=float32`" if np.isfinite(value) else "mend or leave out this bag",
    )


def make_records(
    count: int,
    image: str,
    digest: bytes,
    corners: Array | None = None,
    extent_px: int = 0,
) -> list[InstanceRecord]:
    """Records of rows whose box is known by its corner and extent at most."""
    places = np.zeros((count, 2), np.int64) if corners is None else corners
    size = 0 if corners is None else extent_px
    return [
        InstanceRecord(image, (x, y, x + size, y + size), order, digest)
        for order, (x, y) in enumerate(places.tolist())
    ]


# --- tables ------------------------------------------------------------------------------------


def bare_manifest(name: str, ids: Sequence[str]) -> Manifest:
    """Bags without labels."""
    return Manifest(name, "multilabel", (), tuple(Bag(bag_id) for bag_id in ids), {}, Path())


def manifest_from_tables(
    bags_csv: Path, dataset_toml: Path | None, name: str, *, image_rows: bool = False
) -> Manifest:
    """Bags with labels, splits and groups from a table, described by dataset.toml if any.

    Args:
        image_rows: as `read_bags` takes it.
    """
    toml: dict[str, Any] = {}
    if dataset_toml is not None and dataset_toml.is_file():
        toml = read_toml(dataset_toml)
    bags, labels, task = read_bags(
        bags_csv, labels=toml.get("labels"), task=toml.get("task"), image_rows=image_rows
    )
    return Manifest(
        name=toml.get("name", name),
        task=task,
        labels=labels,
        bags=bags,
        instances={},
        image_root=Path(),
        channels=tuple(toml.get("channels", ())),
        **{key: toml.get(key, "") for key in ("title", "source", "licence", "citation")},
    )


def manifest_from_texts(bags_csv: str, dataset_toml: str, name: str) -> Manifest:
    """A manifest from the texts of bags.csv and dataset.toml; see `manifest_from_tables`."""
    with tempfile.TemporaryDirectory() as folder:
        table, toml = Path(folder, "bags.csv"), Path(folder, "dataset.toml")
        table.write_text(bags_csv, encoding="utf-8", newline="")
        toml.write_text(dataset_toml, encoding="utf-8", newline="")
        return manifest_from_tables(table, toml, name)


# --- files -------------------------------------------------------------------------------------


def reading(path: Path, expected: str) -> AbstractContextManager[None]:
    """Turn the errors of reading a damaged, locked or missing file into one that names it."""
    remedy = "make it again or leave it out, and repeat the command; what is imported is kept"
    return foreign(path, expected=expected, remedy=remedy)


def file_digest(path: Path) -> bytes:
    """sha256 of a file's bytes."""
    with reading(path, "a readable file"):
        return file_sha256(path)
