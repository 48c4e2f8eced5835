"""Settings of how a store is written."""

from __future__ import annotations

from typing import Literal

from dragn_cache.options import Settings, setting

Format = Literal["hdf5", "zarr"]
DType = Literal["float16", "float32"]

PART_INSTANCES = 4096


class WriteConfig(Settings):
    """Settings of how a store is written."""

    format: Format = setting("hdf5", help="Format of the parts.")
    part_instances: int = setting(
        PART_INSTANCES,
        ge=1,
        kind="plan",
        help="At most so many instances a part: what a kill can cost.",
    )
