"""Layers of settings, one before another: what a recipe, a file and the command line give."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dragn_cache.errors import foreign
from dragn_cache.files import read_text
from dragn_cache.options import Settings, declarations


def read_settings(path: Path, section: str | None = None) -> dict[str, Any]:
    """The settings in a TOML file: those of a section if it has it, else all.

    Raises:
        InputError: there is no such file, or it is not TOML.
    """
    with foreign(path, expected="a TOML file", remedy="correct it"):
        table = tomllib.loads(read_text(path))
    inner = table.get(section) if section is not None else None
    return inner if isinstance(inner, dict) else table


def merge(cls: type[Settings], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, a later layer before an earlier one.

    Options are joined one by one; those of a choice that a later layer replaces go with it.
    """
    known = declarations(cls)
    merged: dict[str, Any] = {}
    for layer in layers:
        below, merged = merged, {**merged, **layer}
        for name, declared in known.items():
            choice = declared.options_of
            if choice is None or name not in merged:
                continue
            kept, added = below.get(name), layer.get(name)
            if choice in layer and layer[choice] != below.get(choice, known[choice].default):
                kept = None
            if all(value is None or isinstance(value, Mapping) for value in (kept, added)):
                merged[name] = {**(kept or {}), **(added or {})}
    return merged
