"""Where a data set's tables are, and what its ``dataset.toml`` says.

A data set is named in one of four ways: the name of a shipped one, a folder with ``dataset.toml``,
one CSV, or a folder of bag folders with a label CSV. `find_source` decides which; nothing is read
but ``dataset.toml``.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dragn_cache.errors import ManifestError, UnknownNameError

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
# What each key of [extract] must be: in words, how many values (0: any list), of which type.
EXTRACT_KEYS: dict[str, tuple[str, int, type | tuple[type, ...]]] = {
    "backbone": ("a name", 1, str),
    "size": ("[height, width] in pixels", 2, int),
    "taps": ("a list of names", 0, str),
    "channels": ("rgb, average or each", 1, str),
    "rgb": ("a list of channels", 0, str),
    "intensity": ("a text, as full or percentile:1:99.8", 1, str),
    "mean": ("three numbers", 3, (int, float)),
    "std": ("three numbers", 3, (int, float)),
    "interpolation": ("a name", 1, str),
}


@dataclass(frozen=True)
class Source:
    """The files a manifest is read from: tables, and what dataset.toml says.

    ``instances`` is ``bags`` when one table holds both, None when ``folders`` hold the images.
    """

    name: str
    bags: Path
    instances: Path | None
    folders: Path | None
    image_root: Path
    toml: Mapping[str, Any]


def data_folder() -> Path:
    """The folder for data sets' own files: $DRAGN_CACHE_DATA, or ~/.local/share/dragn-cache."""
    return Path(os.environ.get("DRAGN_CACHE_DATA") or Path.home() / ".local/share/dragn-cache")


def shipped_folder() -> Path:
    """The folder of the manifests that come with the package (wheel or checkout)."""
    package = Path(__file__).parent
    inside = package / "data_manifests"
    return inside if inside.is_dir() else package.parent / "data_manifests"


def shipped_names() -> list[str]:
    """Names of the data sets that come with the package."""
    return sorted(path.parent.name for path in shipped_folder().glob("*/dataset.toml"))


def find_source(dataset: str | Path, *, images: Path | None = None) -> Source:
    """Decide which of the four kinds of source ``dataset`` is, and where its files are."""
    path = Path(dataset)
    if path.is_file() and path.name != "dataset.toml":
        return Source(path.stem, path, path, None, images or path.parent, {})
    folder = path.parent if path.is_file() else path
    if folder.is_dir() and (folder / "dataset.toml").is_file():
        return _toml_source(folder, folder, images)
    if path.is_dir():
        return _folder_source(path, images)
    if str(dataset) in shipped_names():
        name = str(dataset)
        folder = shipped_folder() / name
        here = folder if (folder / "bags.csv").is_file() else data_folder() / name
        return _toml_source(folder, here, images)
    raise UnknownNameError(
        "data set",
        str(dataset),
        shipped_names(),
        remedy="give a folder with dataset.toml, a CSV, a folder of bag folders with a label CSV, "
        f"or one of: {', '.join(shipped_names())}",
    )


def _toml_source(folder: Path, tables: Path, images: Path | None) -> Source:
    toml_path = folder / "dataset.toml"
    toml = _read_toml(toml_path)
    name = toml.get("name", folder.name)
    if not (tables / "bags.csv").is_file():
        how = f"put bags.csv and instances.csv into {tables}"
        if name == "simulated":
            how = f"run: dragn-cache simulate --out {tables}"
        elif tables != folder:
            root = toml_path.parent / _expand(toml.get("images", "."))[0]
            how += f" (or set DRAGN_CACHE_DATA) and the images into {images or root}"
        raise ManifestError(
            f"data set {name!r}", expected=f"a table {tables / 'bags.csv'}", got="none", remedy=how
        )
    instances = tables / "instances.csv"
    return Source(
        name=name,
        bags=tables / "bags.csv",
        instances=instances if instances.is_file() else tables / "bags.csv",
        folders=None,
        image_root=images or _image_root(toml, toml_path),
        toml=toml,
    )


def _folder_source(folder: Path, images: Path | None) -> Source:
    tables = sorted(folder.glob("*.csv"))
    preferred = [t for t in tables if t.name in ("bags.csv", "labels.csv")]
    if (folder / "instances.csv") in tables:
        raise ManifestError(
            str(folder),
            expected="dataset.toml beside instances.csv",
            got="none",
            remedy='add a dataset.toml; one line will do, for example: images = "."',
        )
    if len(preferred or tables) != 1:
        raise ManifestError(
            str(folder),
            expected="dataset.toml, or folders of images with one label CSV beside them",
            got=f"{len(tables)} CSV files" if tables else "neither",
            remedy="put a labels.csv with the columns bag_id,labels beside the bag folders",
        )
    return Source(
        folder.name, (preferred or tables)[0], None, images or folder, images or folder, {}
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            toml = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(
            str(path), expected="valid TOML", got=str(error), remedy="correct that line"
        ) from error
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
    _check_toml_values(path, toml)
    return toml


def _check_toml_values(path: Path, toml: Mapping[str, Any]) -> None:
    if toml.get("task", "multilabel") not in ("multilabel", "multiclass"):
        raise ManifestError(
            f"{path}: task",
            expected="'multilabel' or 'multiclass'",
            got=repr(toml["task"]),
            remedy="choose one of the two",
        )
    for key in ("labels", "channels"):
        names = toml.get(key, [])
        if not all(isinstance(n, str) and n for n in names) or len(set(names)) != len(names):
            raise ManifestError(
                f"{path}: {key}",
                expected="distinct non-empty names",
                got=repr(names),
                remedy="remove repetitions and blanks",
            )
    for key, value in toml.get("extract", {}).items():
        if key not in EXTRACT_KEYS:
            raise ManifestError(
                f"{path}: [extract]",
                expected=f"keys among {', '.join(EXTRACT_KEYS)}",
                got=repr(key),
                remedy="remove or rename it",
            )
        expected, count, kind = EXTRACT_KEYS[key]
        items = value if isinstance(value, list) else [value]
        fits = all(isinstance(item, kind) and not isinstance(item, bool) for item in items)
        if (count == 1) == isinstance(value, list) or not fits or (count and count != len(items)):
            raise ManifestError(
                f"{path}: [extract] {key}",
                expected=expected,
                got=repr(value),
                remedy="correct it",
            )


def _image_root(toml: Mapping[str, Any], toml_path: Path) -> Path:
    expanded, unset = _expand(toml.get("images", "."))
    if unset:
        raise ManifestError(
            f"{toml_path}: images",
            expected=f"the environment variable {unset[0]}",
            got="unset",
            remedy="set it, or give --images DIR",
        )
    return toml_path.parent / expanded


def _expand(text: str) -> tuple[str, list[str]]:
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
