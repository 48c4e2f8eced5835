from .reading import read_bags, read_manifest, read_with_faults
from .records import Bag, Instance, Manifest
from .writing import write_bags, write_manifest

__all__ = [
    "Bag",
    "Instance",
    "Manifest",
    "read_bags",
    "read_manifest",
    "read_with_faults",
    "write_bags",
    "write_manifest",
]
