"""A part's contiguous datasets, read from the file's own bytes.

HDF5 is asked where a dataset lies, and for no value: a damaged heap of texts can hold libhdf5 in
an endless loop (docs/log.md), and a shape that the file does not hold has it fill memory with
zeros.
"""

from __future__ import annotations

import math
import os
import struct
from io import FileIO
from typing import Any

import h5py
import numpy as np

from dragn_cache.store.part import Array, read_exactly

TEXT = np.dtype([("bytes", "<u4"), ("collection", "<u8"), ("number", "<u4")])
"""A text of variable length as a dataset holds it: its length, and its place in a global heap."""
COLLECTION = struct.Struct("<4sB3xQ")  # GCOL, version, size with this head
OBJECT = struct.Struct("<HH4xQ")  # number, references, size; its bytes follow, filled up to 8
DAMAGED = "a heap of texts is damaged"


def read_values(raw: FileIO, dataset: Any) -> Array:
    """A dataset of numbers."""
    dtype = dataset.id.dtype
    if dtype.kind not in "iuf":
        raise ValueError(f"{dataset.name} holds no numbers")
    return _stored(raw, dataset, dtype)


def read_texts(raw: FileIO, dataset: Any) -> list[str]:
    """A one-dimensional dataset of UTF-8 texts of variable length."""
    kind = h5py.check_string_dtype(dataset.id.dtype)
    if kind is None or kind.length is not None or dataset.id.rank != 1:
        raise ValueError(f"{dataset.name} holds no texts")
    stored = _stored(raw, dataset, TEXT)
    left = os.fstat(raw.fileno()).st_size
    # Each text has its own bytes in the file, and each collection too.
    if int(stored["bytes"].sum(dtype=np.uint64)) > left:
        raise ValueError(f"{dataset.name} has longer texts than its file")
    heaps: dict[int, dict[int, bytes]] = {}
    texts = []
    for size, collection, number in stored.tolist():
        if not size:
            texts.append("")
            continue
        if collection not in heaps:
            content = _collection(raw, collection, left)
            left -= len(content)
            heaps[collection] = _objects(content)
        value = heaps[collection].get(number, b"")
        if len(value) < size:
            raise ValueError(f"{dataset.name} has lost a text")
        texts.append(value[:size].decode())
    return texts


def _stored(raw: FileIO, dataset: Any, dtype: np.dtype[Any]) -> Array:
    shape = dataset.id.shape
    if not math.prod(shape):  # an empty dataset has no bytes in the file
        return np.empty(shape, dtype)
    offset = dataset.id.get_offset()
    size = math.prod(shape) * dtype.itemsize
    if offset is None or offset + size > os.fstat(raw.fileno()).st_size:
        raise EOFError(f"{dataset.name} is not in the file as a whole")
    values = np.empty(shape, dtype)
    raw.seek(offset)
    read_exactly(raw, values)
    return values


def _collection(raw: FileIO, at: int, most: int) -> bytes:
    """The bytes of a collection of a global heap, with its head."""
    head = os.pread(raw.fileno(), COLLECTION.size, at)
    if len(head) == COLLECTION.size:
        signature, version, size = COLLECTION.unpack(head)
        if (signature, version) == (b"GCOL", 1) and COLLECTION.size <= size <= most:
            content = os.pread(raw.fileno(), size, at)
            if len(content) == size:
                return content
    raise ValueError(DAMAGED)


def _objects(content: bytes) -> dict[int, bytes]:
    """Number → bytes of every object of a collection."""
    objects: dict[int, bytes] = {}
    at = COLLECTION.size
    while at + OBJECT.size <= len(content):
        number, _, size = OBJECT.unpack_from(content, at)
        if not number:  # the free space behind the last one
            break
        at += OBJECT.size
        if at + size > len(content):
            raise ValueError(DAMAGED)
        objects[number] = content[at : at + size]
        at += -(-size // 8) * 8
    return objects
