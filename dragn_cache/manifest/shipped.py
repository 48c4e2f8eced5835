"""Manifests that are part of the package."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder() -> Path:
    """The folder for data sets' own files: $DRAGN_CACHE_DATA, or ~/.local/share/dragn-cache."""
    # Path.home() raises where there is none: in a container, a user need not have a name.
    home = os.path.expanduser("~")  # noqa: PTH111
    return Path(os.environ.get("DRAGN_CACHE_DATA") or f"{home}/.local/share/dragn-cache")


def shipped_folder() -> Path:
    """The folder of the manifests that come with the package (wheel or checkout)."""
    package = Path(__file__).parents[1]
    inside = package / "data_manifests"
    return inside if inside.is_dir() else package.parent / "data_manifests"


def shipped_names() -> list[str]:
    """Names of the data sets that come with the package."""
    return sorted(path.parent.name for path in shipped_folder().glob("*/dataset.toml"))
