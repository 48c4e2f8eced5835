"""Parts as HDF5 files: contiguous, uncompressed datasets, written in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dragn_cache.files import require_regular
from dragn_cache.store.hdf5_bytes import read_texts, read_values
from dragn_cache.store.hdf5_links import own_dataset
from dragn_cache.store.hdf5_trial import try_reading
from dragn_cache.store.hdf5_writing import writing_hdf5
from dragn_cache.store.part import (
    Array,
    BagRows,
    PartIndex,
    Pieces,
    RowTable,
    bag_rows,
    blocks,
    index_arrays,
    index_from_arrays,
    read_exactly,
    require_extent,
)
from dragn_cache.store.schema import Tap


class Hdf5Format:
    """See `dragn_cache.store.part.PartFormat`."""

    suffix = ".h5"

    def write(
        self,
        path: Path,
        index: PartIndex,
        taps: Sequence[Tap],
        views: Sequence[str],
        rows: RowTable,
    ) -> None:
        with writing_hdf5(path) as (file, check):
            for name, values in index_arrays(index).items():
                dtype = h5py.string_dtype() if values.dtype.kind == "T" else values.dtype
                file.create_dataset(name, shape=values.shape, dtype=dtype)
                if len(values):
                    file[name][...] = values.astype(object) if values.dtype.kind == "T" else values
            for tap in taps:
                for view in views:
                    dataset = file.create_dataset(
                        f"taps/{tap.name}/{view}", (index.rows, *tap.shape), tap.dtype
                    )
                    for start, stop in blocks(index.rows, tap.row_bytes):
                        check()
                        dataset[start:stop] = rows[tap.name, view].read(start, stop)

    def try_reading(self, path: Path) -> None:
        try_reading(path, lock=False)

    def read_index(self, path: Path) -> PartIndex:
        with _opened(path) as (file, raw):
            return index_from_arrays(partial(_read, file, raw))

    def read_bags(self, path: Path) -> BagRows:
        with _opened(path) as (file, raw):
            return bag_rows(partial(_read, file, raw), len(own_dataset(file, "instances/order")))

    def read_rows(self, path: Path, tap: Tap, view: str, pieces: Pieces) -> None:
        pieces = [(start, out) for start, out in pieces if len(out)]
        if not pieces:  # an empty dataset has no bytes in the file
            return
        with _opened(path) as (file, raw):
            dataset = own_dataset(file, f"taps/{tap.name}/{view}")
            require_extent(dataset.shape, dataset.dtype, tap, pieces)
            offset = dataset.id.get_offset()
            for start, out in pieces:
                raw.seek(offset + start * tap.row_bytes)
                read_exactly(raw, out)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, FileIO]]:
    """A part as an HDF5 file and as bytes. HDF5 reads it through the latter, so that it asks for no
    lock, which some network file systems refuse: nobody writes to a part that exists."""
    require_regular(path)
    with path.open("rb", buffering=0) as raw, h5py.File(raw, "r") as file:
        yield file, raw


def _read(file: Any, raw: FileIO, name: str) -> Array | None:
    """An array of the index; None if there is none."""
    try:
        dataset = own_dataset(file, name)
    except KeyError:
        return None
    is_text = h5py.check_string_dtype(dataset.id.dtype) is not None
    return np.array(read_texts(raw, dataset), object) if is_text else read_values(raw, dataset)
