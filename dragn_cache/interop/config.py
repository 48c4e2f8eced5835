"""Settings of an import of another tool's features."""

from __future__ import annotations

from typing import Literal

from dragn_cache.options import Settings, setting


class ImportConfig(Settings):
    """Settings of an import of another tool's features."""

    layout: str | None = setting(
        None,
        help="clam, trident, stamp, pt, npy, torchmil, npz, anndata, hdf5 or zarr.",
        shown_default="recognised",
    )
    format: Literal["hdf5", "zarr"] = setting("hdf5", help="Format of the parts.")
    dtype: Literal["float16", "float32"] | None = setting(
        None,
        kind="numerics",
        help="Convert the features.",
        shown_default="as they are, exactly",
    )
    encoder: str | None = setting(
        None, kind="features", help="The network's name, where the source has none."
    )
    unmatched: Literal["refuse", "drop"] = setting(
        "refuse", help="Bags that only the table or only the source has."
    )
    part_instances: int = setting(
        4096, ge=1, kind="plan", help="At most so many instances a part: what a kill can cost."
    )
