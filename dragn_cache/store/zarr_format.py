"""Parts as Zarr v3 groups: uncompressed shards of inner chunks, written shard by shard.

Features are read without the library: an uncompressed shard is raw chunks and an index at its end,
and reading the bytes at those offsets is several times faster. A missing shard is then an error;
the library would silently read it as zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import VLenUTF8

from dragn_cache.files import (
    MOST_TABLE_BYTES,
    read_limited,
    read_text,
    require_regular,
)
from dragn_cache.store.part import (
    Array,
    BagRows,
    PartIndex,
    Pieces,
    RowTable,
    bag_rows,
    index_arrays,
    index_from_arrays,
    read_exactly,
    require_extent,
)
from dragn_cache.store.schema import Tap

CHUNK_BYTES = 2 * 2**20
SHARD_BYTES = 128 * 2**20
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("bytes", "<u8")])
CRC_BYTES = 4


class ZarrFormat:
    """See `dragn_cache.store.part.PartFormat`."""

    suffix = ".zarr"

    def write(
        self,
        path: Path,
        index: PartIndex,
        taps: Sequence[Tap],
        views: Sequence[str],
        rows: RowTable,
    ) -> None:
        group = zarr.create_group(path, zarr_format=3)
        for name, values in index_arrays(index).items():
            array = _create(group, name, values.shape, values.dtype, values.shape)
            if len(values):
                array[...] = values
        for tap in taps:
            chunk, shard = chunk_and_shard_rows(index.rows, tap.row_bytes)
            for view in views:
                name = f"taps/{tap.name}/{view}"
                shape = (index.rows, *tap.shape)
                array = _create(group, name, shape, tap.dtype, (chunk, *tap.shape), shard)
                for start in range(0, index.rows, shard):
                    stop = min(start + shard, index.rows)
                    array[start:stop] = rows[tap.name, view].read(start, stop)

    def try_reading(self, path: Path) -> None:
        """Nothing to try: uncompressed chunks are read by Python alone."""

    def read_index(self, path: Path) -> PartIndex:
        return index_from_arrays(partial(_read, path))

    def read_bags(self, path: Path) -> BagRows:
        (rows,) = _metadata(path / "instances" / "order")["shape"]
        return bag_rows(partial(_read, path), rows)

    def read_rows(self, path: Path, tap: Tap, view: str, pieces: Pieces) -> None:
        folder = path / "taps" / tap.name / view
        metadata = _metadata(folder)
        require_extent(tuple(metadata["shape"]), metadata["data_type"], tap, pieces)
        shard_rows = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        chunk_rows = metadata["codecs"][0]["configuration"]["chunk_shape"][0]
        by_shard: dict[int, list[tuple[int, Array]]] = {}
        for start, out in pieces:
            for shard, first, piece in _cut(start, out, shard_rows):
                by_shard.setdefault(shard, []).append((first, piece))
        for shard, shard_pieces in by_shard.items():
            file = folder.joinpath("c", str(shard), *["0"] * len(tap.shape))
            chunks = shard_rows // chunk_rows
            _read_shard(file, chunks, chunk_rows, tap.row_bytes, shard_pieces)


def chunk_and_shard_rows(rows: int, row_bytes: int) -> tuple[int, int]:
    """Rows of an inner chunk (about `CHUNK_BYTES`) and of a shard (at most `SHARD_BYTES`).

    Shards are made equal, so that the last one is not padded with much more than a chunk.
    """
    chunk = max(1, min(CHUNK_BYTES // row_bytes, rows))
    chunks = max(1, math.ceil(rows / chunk))
    shards = math.ceil(chunks / max(1, SHARD_BYTES // (chunk * row_bytes)))
    return chunk, chunk * math.ceil(chunks / shards)


def _create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    chunk: tuple[int, ...],
    shard_rows: int | None = None,
) -> Any:
    """An uncompressed array; chunks that are all zero are written too, so that a missing one is
    damage and never data."""
    return group.create_array(
        name,
        shape=shape,
        dtype="string" if np.dtype(dtype).kind == "T" else dtype,
        chunks=tuple(max(1, n) for n in chunk),
        shards=None if shard_rows is None else (shard_rows, *chunk[1:]),
        compressors=None,
        filters=None,
        config={"write_empty_chunks": True},
    )


def _metadata(array: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads(read_text(array / "zarr.json"))
    return metadata


def _read(path: Path, name: str) -> Array | None:
    """An array of the index, which is one uncompressed chunk; None if there is none.

    The library takes a millisecond for each array, which adds up over many small parts.
    """
    array = path / name
    if not array.exists():
        return None
    metadata = _metadata(array)
    codecs, shape = [codec["name"] for codec in metadata["codecs"]], metadata["shape"]
    if codecs not in (["bytes"], ["vlen-utf8"]):
        raise ValueError(f"{name} is not stored uncompressed")
    chunk = b""
    if math.prod(shape):
        chunk = read_limited(array.joinpath("c", *["0"] * len(shape)), MOST_TABLE_BYTES)
    if codecs == ["vlen-utf8"]:
        if not chunk:
            return np.empty(0, object)
        count = int.from_bytes(chunk[:4], "little")  # each text has four bytes at least
        if shape != [count] or len(chunk) < 4 + 4 * count:
            raise ValueError(f"{name} has other texts than its shape says")
        values: Array = VLenUTF8().decode(chunk)
        return values
    kind = np.dtype(metadata["data_type"]).newbyteorder("<")
    return np.frombuffer(chunk, kind).reshape(shape).astype(kind.newbyteorder("="))


def _cut(start: int, out: Array, block: int) -> Iterator[tuple[int, int, Array]]:
    """Rows from ``start`` on, cut where a block of rows ends: block, first row in it, piece."""
    done = 0
    while done < len(out):
        number, inside = divmod(start + done, block)
        count = min(len(out) - done, block - inside)
        yield number, inside, out[done : done + count]
        done += count


def _read_shard(path: Path, chunks: int, chunk_rows: int, row_bytes: int, pieces: Pieces) -> None:
    """Fill every piece with the shard's rows from its start on."""
    require_regular(path)
    with path.open("rb", buffering=0) as raw:
        raw.seek(-(chunks * INDEX_ENTRY.itemsize + CRC_BYTES), 2)
        table = np.empty(chunks, INDEX_ENTRY)
        read_exactly(raw, table)
        if (table["bytes"] != chunk_rows * row_bytes).any():
            raise ValueError(f"shard {path.name} has chunks of another size")
        offsets = table["offset"].tolist()
        for start, out in pieces:
            for chunk, inside, piece in _cut(start, out, chunk_rows):
                raw.seek(offsets[chunk] + inside * row_bytes)
                read_exactly(raw, piece)
