"""Parts as HDF5 files: contiguous, uncompressed datasets, written in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py

from dragn_cache.store.hdf5_links import open_part, own_dataset, read_whole
from dragn_cache.store.part import (
    BagRows,
    PartIndex,
    Pieces,
    RowTable,
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
        with h5py.File(path, "x") as file:
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
                        dataset[start:stop] = rows[tap.name, view].read(start, stop)

    def read_index(self, path: Path) -> PartIndex:
        with open_part(path) as file:
            return index_from_arrays(
                lambda name, text: read_whole(own_dataset(file, name), text=text)
            )

    def read_bags(self, path: Path) -> BagRows:
        with open_part(path) as file:
            return BagRows(
                ids=tuple(str(v) for v in read_whole(own_dataset(file, "bags/id"), text=True)),
                offsets=read_whole(own_dataset(file, "bags/offsets")),
                rows=len(own_dataset(file, "instances/order")),
            )

    def read_rows(self, path: Path, tap: Tap, view: str, pieces: Pieces) -> None:
        pieces = [(start, out) for start, out in pieces if len(out)]
        if not pieces:  # an empty dataset has no bytes in the file
            return
        with open_part(path) as file:
            dataset = own_dataset(file, f"taps/{tap.name}/{view}")
            require_extent(dataset.shape, dataset.dtype, tap, pieces)
            offset = dataset.id.get_offset()
        with path.open("rb", buffering=0) as raw:  # the file that was just opened
            for start, out in pieces:
                raw.seek(offset + start * tap.row_bytes)
                read_exactly(raw, out)
