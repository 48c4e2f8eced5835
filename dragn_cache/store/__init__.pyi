from .formats import FORMATS
from .part import Failure, PartIndex
from .part_writer import InstanceRecord, PartWriter
from .plan import PartPlan, instances_of, manifest_digest, plan_parts
from .reader import Store, open_store
from .schema import StoreDescription, Tap, differences, json_digest, read_description
from .writer import StoreWriter, open_writer

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
