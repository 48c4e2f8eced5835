"""Settings of an import of another tool's features."""

from __future__ import annotations

from typing import Literal

from dragn_cache.options import setting
from dragn_cache.store.config import DType, WriteConfig

SourceLayout = Literal[
    "clam", "trident", "stamp", "pt", "npy", "torchmil", "npz", "anndata", "hdf5", "zarr"
]
TargetLayout = Literal["clam", "trident", "torchmil", "hdf5", "zarr", "anndata"]


class ImportConfig(WriteConfig):
    """Settings of an import of another tool's features."""

    layout: SourceLayout | None = setting(
        None, help="Whose files they are.", shown_default="recognised"
    )
    dtype: DType | None = setting(
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
