"""The formats a store can have, by name."""

from __future__ import annotations

from dragn_cache.store.hdf5_format import Hdf5Format
from dragn_cache.store.part import PartFormat
from dragn_cache.store.zarr_format import ZarrFormat

FORMATS: dict[str, PartFormat] = {"hdf5": Hdf5Format(), "zarr": ZarrFormat()}
