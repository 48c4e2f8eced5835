"""The feature store: a folder of parts in HDF5 or Zarr v3, keyed by bag. Knows no torch.

``open_store(path)`` reads one; ``docs/store-format.md`` is the normative description of the files.
"""

from dragn_cache.store.formats import FORMATS
from dragn_cache.store.part import Failure, PartIndex
from dragn_cache.store.part_writer import InstanceRecord, PartWriter
from dragn_cache.store.plan import PartPlan, instances_of, manifest_digest, plan_parts
from dragn_cache.store.reader import Store, open_store
from dragn_cache.store.schema import (
    StoreDescription,
    Tap,
    differences,
    json_digest,
    read_description,
)
from dragn_cache.store.writer import StoreWriter, open_writer

__all__ = [
    "FORMATS",
    "Failure",
    "InstanceRecord",
    "PartIndex",
    "PartPlan",
    "PartWriter",
    "Store",
    "StoreDescription",
    "StoreWriter",
    "Tap",
    "differences",
    "instances_of",
    "json_digest",
    "manifest_digest",
    "open_store",
    "open_writer",
    "plan_parts",
    "read_description",
]
