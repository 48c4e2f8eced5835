"""Calls of ``kernels.cpp``: its jobs, its library for a dtype and size, memory for it."""

from __future__ import annotations

import ctypes
import os
import weakref
from concurrent.futures import wait as wait_for
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.aggregators.recursion import library

SOURCE = Path(__file__).with_name("kernels.cpp")
REALS = {torch.float32: "float", torch.float64: "double"}
READABLE = {
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float64: "float64",
}
ALIGNMENT = 64  # bytes
SPARE_BYTES = 2**30  # kept from one step to the next


class _Layer(ctypes.Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("transposed", c_void_p),
        ("gradients", c_void_p),
        ("stride", c_int64),
        ("outputs", c_int64),
    )


class Job(ctypes.Structure):
    """The arguments of a call, in the order of ``struct Job`` in ``kernels.cpp``."""

    _fields_ = (
        ("next", c_int64),
        ("blocks", c_int64),
        ("rows", c_int64),
        ("out_rows", c_int64),
        ("windows", c_int64),
        ("orders", c_int64),
        ("h", c_int64),
        ("w", c_int64),
        ("layers", c_int64),
        ("layer", c_int64),
        ("grouped", c_int64),
        ("members", c_void_p),
        ("maps", c_void_p),
        ("out", c_void_p),
        ("hidden", c_void_p * 2),
        ("affine", c_void_p * 2),
        ("moments", c_void_p),
        ("grad_out", c_void_p),
        ("grad_maps", c_void_p),
        ("grad_hidden", c_void_p * 2),
        ("backward", c_void_p * 2),
        ("sums", c_void_p),
        ("layer_of", _Layer * 3),
    )


class Kernels:
    """The compiled library for one dtype, kernel size and width of a window."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.lanes.restype = c_int64
        self.lanes: int = library.lanes()

    def blocks(self, channels: int) -> int:
        return -(-channels // self.lanes)

    def reads(self, dtype: torch.dtype) -> bool:
        """Whether features of a dtype need no conversion first (float16 needs its compiler)."""
        return dtype in READABLE and hasattr(self._library, f"arrange_{READABLE[dtype]}")

    def run(self, name: str, job: Job, *more: Any) -> None:
        """Run a function of the library on all threads that PyTorch would use."""
        function = getattr(self._library, name)
        job.next = 0
        count = min(torch.get_num_threads(), job.blocks)
        arguments = (ctypes.byref(job), *more)
        pool = library.threads(max(1, torch.get_num_threads() - 1), os.getpid())
        others = [pool.submit(function, *arguments) for _ in range(count - 1)]
        try:
            function(*arguments)
        finally:  # even after Ctrl-C: the memory that they write to is freed after this call
            wait_for(others)


@cache
def kernels(dtype: torch.dtype, kernel: int, inputs: int) -> Kernels | None:
    """The library for a dtype, a kernel size and windows of ``inputs`` maps.

    None where it cannot be compiled.
    """
    defines = (f"REAL={REALS[dtype]}", f"KERNEL={kernel}", f"INPUTS={inputs}")
    loaded = library.load_library(SOURCE, *defines)
    return None if loaded is None else Kernels(loaded)


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) aligned for the widest vectors, not initialised.

    Freed memory is used again, up to `SPARE_BYTES`: every step of training needs about the same,
    and new pages would cost as much as the arithmetic.
    """
    size = torch.empty((), dtype=dtype).element_size() * count
    raw = _take_spare(size + ALIGNMENT)
    start = -raw.ctypes.data % ALIGNMENT
    piece = raw[start : start + size]
    weakref.finalize(piece, _keep_spare, raw)
    return torch.from_numpy(piece).view(dtype)


_SPARE: dict[int, NDArray[np.uint8]] = {}
"""Freed memory by address. It is freed at any moment, in any thread, so that each change of the
dictionary is one atomic step."""


def _take_spare(size: int) -> NDArray[np.uint8]:
    for address, spare in list(_SPARE.items()):
        if size <= spare.nbytes <= 2 * size and _SPARE.pop(address, None) is not None:
            return spare
    return np.empty(size, np.uint8)


def _keep_spare(raw: NDArray[np.uint8]) -> None:
    _SPARE[raw.ctypes.data] = raw
    spares = list(_SPARE.items())
    total = sum(spare.nbytes for _, spare in spares)
    for address, spare in spares:  # the oldest first
        if total > SPARE_BYTES and _SPARE.pop(address, None) is not None:
            total -= spare.nbytes
