"""Manifests: the instances of each bag, with labels, splits and groups."""

from dragn_cache.manifest.reading import read_bags, read_manifest, read_with_faults
from dragn_cache.manifest.records import Bag, Instance, Manifest
from dragn_cache.manifest.writing import write_bags, write_manifest

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
