"""The places of a data set's tables, and its ``dataset.toml``.

A data set is named in one of four ways: the name of a shipped one, a folder with ``dataset.toml``,
one CSV, or a folder of bag folders with a label CSV. `find_source` decides which one is meant; it
reads no file but ``dataset.toml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dragn_cache.errors import ManifestError, UnknownNameError
from dragn_cache.manifest.dataset_toml import expand_variables, find_image_root, read_toml
from dragn_cache.manifest.shipped import data_folder, shipped_folder, shipped_names


@dataclass(frozen=True)
class Source:
    """The files of a manifest: its tables, and the contents of dataset.toml.

    ``instances`` is ``bags`` when one table holds both, None when ``folders`` hold the images.
    """

    name: str
    bags: Path
    instances: Path | None
    folders: Path | None
    image_root: Path
    toml: Mapping[str, Any]


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
        tables = folder if (folder / "bags.csv").is_file() else data_folder() / name
        return _toml_source(folder, tables, images)
    raise UnknownNameError(
        "data set",
        str(dataset),
        shipped_names(),
        remedy="give a folder with dataset.toml, a CSV, a folder of bag folders with a label CSV, "
        f"or one of: {', '.join(shipped_names())}",
    )


def _toml_source(folder: Path, tables: Path, images: Path | None) -> Source:
    toml_path = folder / "dataset.toml"
    toml = read_toml(toml_path)
    name = toml.get("name", folder.name)
    if not (tables / "bags.csv").is_file():
        remedy = f"put bags.csv and instances.csv into {tables}"
        if name == "simulated":
            remedy = f"run: dragn-cache simulate --out {tables}"
        elif tables != folder:
            root = toml_path.parent / expand_variables(toml.get("images", "."))[0]
            remedy += f" (or set DRAGN_CACHE_DATA) and the images into {images or root}"
        raise ManifestError(
            f"data set {name!r}",
            expected=f"a table {tables / 'bags.csv'}",
            got="none",
            remedy=remedy,
        )
    instances = tables / "instances.csv"
    return Source(
        name=name,
        bags=tables / "bags.csv",
        instances=instances if instances.is_file() else tables / "bags.csv",
        folders=None,
        image_root=images or find_image_root(toml, toml_path),
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
