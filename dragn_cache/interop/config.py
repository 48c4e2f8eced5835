"""Settings of an import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dragn_cache.options import at_least, one_of


@dataclass(frozen=True)
class ImportConfig:
    """Settings of an import.

    Attributes:
        layout: of the source; None is recognised.
        format: how parts are written.
        dtype: how features are stored; None keeps the source's, exactly.
        encoder: name of the network, where the source does not say it.
        unmatched: ``refuse`` or ``drop`` bags that only the table or only the source has.
        part_instances: the most instances of a part.
    """

    layout: str | None = None
    format: Literal["hdf5", "zarr"] = "hdf5"
    dtype: Literal["float16", "float32"] | None = None
    encoder: str | None = None
    unmatched: Literal["refuse", "drop"] = "refuse"
    part_instances: int = 4096

    def __post_init__(self) -> None:
        one_of("--format", self.format, ("hdf5", "zarr"))
        if self.dtype is not None:
            one_of("--dtype", self.dtype, ("float16", "float32"))
        one_of("--unmatched", self.unmatched, ("refuse", "drop"))
        at_least("--part-instances", self.part_instances, 1)
