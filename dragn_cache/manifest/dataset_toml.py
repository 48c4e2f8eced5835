"""``dataset.toml``: read, checked and written."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from dragn_cache.backbone_input import ExtractDefaults
from dragn_cache.errors import InputError, ManifestError, SettingError, foreign
from dragn_cache.files import (
    is_storable,
    read_text,
    write_text,
)
from dragn_cache.manifest.records import Manifest
from dragn_cache.manifest.shipped import data_folder
from dragn_cache.options import declarations, require_known


def write_dataset_toml(manifest: Manifest, path: Path, *, images: str | None = None) -> None:
    """Write the description of a data set; ``images`` None leaves the image root out."""
    write_text(path, dataset_text(manifest, images=images))


def dataset_text(manifest: Manifest, *, images: str | None = None) -> str:
    """The text that `write_dataset_toml` writes."""
    toml: dict[str, Any] = {"name": manifest.name, "title": manifest.title, "task": manifest.task}
    toml |= {"labels": list(manifest.labels), "channels": list(manifest.channels)}
    toml |= {"images": images} if images is not None else {}
    toml |= {k: getattr(manifest, k) for k in ("source", "licence", "citation")}
    toml |= {"extract": dict(manifest.extract)}
    return tomli_w.dumps({k: v for k, v in toml.items() if v})


DATASET_KEYS = {
    "name": str,
    "title": str,
    "task": str,
    "labels": list,
    "channels": list,
    "images": str,
    "source": str,
    "licence": str,
    "citation": str,
    "extract": dict,
}


def read_toml(path: Path) -> dict[str, Any]:
    with foreign(path, expected="valid TOML", remedy="correct it", kind=ManifestError):
        toml = tomllib.loads(read_text(path))
    for key, value in toml.items():
        if key not in DATASET_KEYS:
            raise ManifestError(
                str(path),
                expected=f"keys among {', '.join(DATASET_KEYS)}",
                got=repr(key),
                remedy="remove or rename it",
            )
        if not isinstance(value, DATASET_KEYS[key]):
            raise ManifestError(
                f"{path}: {key}",
                expected=f"a {DATASET_KEYS[key].__name__}",
                got=repr(value),
                remedy="correct its type",
            )
    _require_toml_values(path, toml)
    return toml


def _require_toml_values(path: Path, toml: Mapping[str, Any]) -> None:
    if toml.get("task", "multilabel") not in ("multilabel", "multiclass"):
        raise ManifestError(
            f"{path}: task",
            expected="'multilabel' or 'multiclass'",
            got=repr(toml["task"]),
            remedy="choose one of the two",
        )
    for key in ("labels", "channels"):
        names = toml.get(key, [])
        if not all(map(_is_name, names)) or len(set(names)) != len(names):
            raise ManifestError(
                f"{path}: {key}",
                expected="distinct non-empty names",
                got=repr(names),
                remedy="remove repetitions, blanks and space around them",
            )
    _require_defaults(f"{path}: [extract]", toml.get("extract", {}))


def _is_name(value: object) -> bool:
    """Whether a value is a text that tables hold as it is."""
    return isinstance(value, str) and value.strip() == value != "" and is_storable(value)


def _require_defaults(where: str, table: Mapping[str, Any]) -> None:
    try:
        require_known(where, table, declarations(ExtractDefaults))
        ExtractDefaults(**table)
    except InputError as error:
        place = f"{where} {error.where}" if isinstance(error, SettingError) else error.where
        raise ManifestError(
            place, expected=error.expected, got=error.got, remedy=error.remedy
        ) from error


def find_image_root(toml: Mapping[str, Any], toml_path: Path) -> Path:
    expanded, unset = expand_variables(toml.get("images", "."))
    if unset:
        raise ManifestError(
            f"{toml_path}: images",
            expected=f"the environment variable {unset[0]}",
            got="unset",
            remedy="set it, or give `images`",
        )
    return toml_path.parent / expanded


def expand_variables(text: str) -> tuple[str, list[str]]:
    """A path with its ``$VARIABLE`` and ``${VARIABLE}`` filled in, and those that are unset."""
    unset = []

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if name == "DRAGN_CACHE_DATA":
            return str(data_folder())
        if name not in os.environ:
            unset.append(name)
        return os.environ.get(name, match.group())

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text), unset
