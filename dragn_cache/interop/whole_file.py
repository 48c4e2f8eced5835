"""A whole store as one HDF5 file or one Zarr group: the arrays of a part, over all bags.

Nothing is left out: every tap and view, images, boxes, failures, and in ``store/`` the texts of
store.json and of the manifest's two tables. docs/store-format.md describes the arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import zarr

from dragn_cache.checksums import checksums_text
from dragn_cache.errors import InputError
from dragn_cache.files import read_text, require_regular_below
from dragn_cache.interop.source import BagFeatures, MadeBy, Source, manifest_from_texts, reading
from dragn_cache.interop.target import Target, bags_without_part
from dragn_cache.manifest.writing import bags_text
from dragn_cache.store import FORMATS, InstanceRecord, PartIndex, Store, StoreDescription, Tap
from dragn_cache.store.hdf5_trial import open_alone
from dragn_cache.store.hdf5_writing import writing_hdf5
from dragn_cache.store.part import Array, RowTable, bag_digests, require_index, require_sealed
from dragn_cache.store.schema import parse_description

TEXTS = ("store_json", "dataset_toml", "bags_csv")
SUMS = "sha256sums"


class _WholeSource(Source):
    def __init__(self, path: Path) -> None:
        self.path, self._format = path, FORMATS[self.layout]
        with reading(path, f"a store that was exported as {self.layout}"):
            texts, sums = _read_texts(path, self.layout)
            store_json, dataset_toml, bags_csv = texts
            self._description: StoreDescription = parse_description(store_json, path)
            self._index = self._format.read_index(path)
            require_sealed(self._index, self._description)
            if self._description.is_sealed and sums != _sums(texts):
                raise ValueError(f"texts in store/ that are not as store/{SUMS} has them")
            require_index(self._index, self._index.ids)
        self.ids = list(self._index.ids)
        self.manifest = manifest_from_texts(bags_csv, dataset_toml, path.stem)
        self.views = self._description.views
        self.features = self._description.provenance["features"]
        self.numerics = self._description.provenance["numerics"]
        self._position = {bag_id: k for k, bag_id in enumerate(self.ids)}

    def read(self, bag_id: str) -> BagFeatures:
        index, k = self._index, self._position[bag_id]
        start, stop = int(index.offsets[k]), int(index.offsets[k + 1])
        values: dict[tuple[str, str], Array] = {}
        with reading(self.path, "features as they were exported"):
            for tap in self._description.taps:
                for view in self.views:
                    out = np.empty((stop - start, *tap.shape), tap.dtype)
                    self._format.read_rows(self.path, tap, view, [(start, out)])
                    values[tap.name, view] = out
        digest: bytes = index.digests[k].tobytes()
        self._require_digest(bag_id, digest, stop - start, values)
        records = [
            InstanceRecord(
                index.images[row],
                tuple(index.boxes[row].tolist()),
                int(index.order[row]),
                index.image_digests[row].tobytes(),
            )
            for row in range(start, stop)
        ]
        made_by = MadeBy(str(self.features.get("backbone")) if self.features else "unknown")
        lost = [failure for failure in index.failures if failure.bag_id == bag_id]
        return BagFeatures(str(self.path), values, records, digest, made_by, lost)

    def _require_digest(
        self, bag_id: str, digest: bytes, rows: int, values: dict[tuple[str, str], Array]
    ) -> None:
        table: RowTable = {key: _ArrayRows(array) for key, array in values.items()}
        offsets = np.array([0, rows], np.int64)
        actual = bag_digests(offsets, self._description.taps, self.views, table)[0]
        if actual.tobytes() != digest:
            raise InputError(
                f"{self.path}, bag {bag_id!r}",
                expected="features that give their digest",
                got="others",
                remedy="export the store again",
            )


class Hdf5Source(_WholeSource):
    """One HDF5 file that `export` wrote."""

    layout = "hdf5"


class ZarrSource(_WholeSource):
    """One Zarr group that `export` wrote."""

    layout = "zarr"


class _WholeTarget(Target):
    holds_all: ClassVar[bool] = True
    named_files = False

    def write(self, store: Store, tap: Tap, path: Path, advance: Callable[[], None]) -> None:
        index = joined_index(store.instances(bag_id) for bag_id in store.bag_ids)
        description = store.description
        rows: RowTable = {
            (t.name, view): _StoreRows(store, t.name, view, index, lambda: None)
            for t in description.taps
            for view in description.views
        }
        # Taps are written one after the other: the last one alone counts bags as done.
        last = (description.taps[-1].name, description.views[-1])
        rows[last] = _StoreRows(store, *last, index, advance)
        FORMATS[self.layout].write(path, index, description.taps, description.views, rows)
        toml = read_text(store.path / "manifest" / "dataset.toml")
        texts = (description.to_json(), toml, bags_text(bags_without_part(store)))
        _write_texts(path, self.layout, texts)


class Hdf5Target(_WholeTarget):
    """One HDF5 file with everything."""

    layout = "hdf5"
    is_folder = False


class ZarrTarget(_WholeTarget):
    """One Zarr group with everything."""

    layout = "zarr"


class _ArrayRows:
    def __init__(self, values: Array) -> None:
        self.values = values

    def read(self, start: int, stop: int) -> Array:
        return self.values[start:stop]


class _StoreRows:
    """Rows of one tap and view over all bags, read bag by bag; the last bag stays in memory."""

    def __init__(
        self, store: Store, tap: str, view: str, index: PartIndex, advance: Callable[[], None]
    ) -> None:
        self.store, self.tap, self.view, self.index = store, tap, view, index
        self.advance = advance
        self._bag, self._values = -1, np.empty(0)

    def read(self, start: int, stop: int) -> Array:
        offsets = self.index.offsets
        first = int(np.searchsorted(offsets, start, "right")) - 1
        pieces = []
        while first < len(offsets) - 1 and offsets[first] < stop:
            begin = int(offsets[first])
            values = self._load(first)
            pieces.append(values[max(start - begin, 0) : stop - begin])
            first += 1
        return np.concatenate(pieces)

    def _load(self, bag: int) -> Array:
        if bag != self._bag:
            for _ in range(bag - max(self._bag, -1)):
                self.advance()
            self._bag = bag
            self._values = self.store.bag(self.index.ids[bag], self.tap, view=self.view)
        return self._values


def joined_index(pieces: Iterable[PartIndex]) -> PartIndex:
    """The indexes of several parts as one."""
    parts = list(pieces)
    sizes = np.concatenate([np.diff(part.offsets) for part in parts])
    return PartIndex(
        ids=tuple(bag_id for part in parts for bag_id in part.ids),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        digests=np.concatenate([part.digests for part in parts]),
        plans=np.concatenate([part.plans for part in parts]),
        images=tuple(image for part in parts for image in part.images),
        boxes=np.concatenate([part.boxes for part in parts]),
        order=np.concatenate([part.order for part in parts]),
        image_digests=np.concatenate([part.image_digests for part in parts]),
        failures=tuple(failure for part in parts for failure in part.failures),
    )


# --- the texts ---------------------------------------------------------------------------------


def _read_texts(path: Path, layout: str) -> tuple[list[str], str | None]:
    """The texts, and their digests, which files of older versions do not have."""
    if layout == "hdf5":
        with open_alone(path) as file:
            texts = [str(file[f"store/{name}"].asstr()[0]) for name in TEXTS]
            sums = f"store/{SUMS}"
            return texts, str(file[sums].asstr()[0]) if sums in file else None
    require_regular_below(path)
    group: Any = zarr.open_group(path, mode="r")
    texts = [str(group[f"store/{name}"][0]) for name in TEXTS]
    return texts, str(group[f"store/{SUMS}"][0]) if f"store/{SUMS}" in group else None


def _sums(texts: Sequence[str]) -> str:
    named = zip(TEXTS, texts, strict=True)
    return checksums_text({name: hashlib.sha256(t.encode()).hexdigest() for name, t in named})


def _write_texts(path: Path, layout: str, texts: Sequence[str]) -> None:
    named = zip((*TEXTS, SUMS), (*texts, _sums(texts)), strict=True)
    if layout == "hdf5":
        with writing_hdf5(path, "r+") as (file, _):
            for name, text in named:
                file.create_dataset(f"store/{name}", data=[text], dtype=h5py.string_dtype())
        return
    group = zarr.open_group(path, mode="r+")
    for name, text in named:
        group.create_array(f"store/{name}", shape=(1,), dtype="string")[...] = np.array([text])
