"""One ``.npy`` per bag: a plain folder, or torchmil's folders of features, labels and coords."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dragn_cache.errors import InputError
from dragn_cache.files import open_regular
from dragn_cache.interop.bag_files import TABLE, BagFiles, FileFeatures
from dragn_cache.interop.source import file_digest, reading
from dragn_cache.interop.target import Target, exported_bags, write_tables
from dragn_cache.manifest import Bag, Manifest
from dragn_cache.manifest.reading import infer_task
from dragn_cache.store import Store, Tap
from dragn_cache.store.part import Array


class NpySource(BagFiles):
    """A folder of ``BAG.npy``, loaded as data only."""

    layout = "npy"
    suffix = ".npy"

    def read_file(self, path: Path) -> FileFeatures:
        return FileFeatures(_load(path))


class TorchmilSource(NpySource):
    """torchmil's ``features/``, with ``coords/`` and ``labels/`` if those folders exist."""

    layout = "torchmil"
    folder_name = "features"

    def read_file(self, path: Path) -> FileFeatures:
        coords = self.path / "coords" / path.name
        corners = _load(coords) if coords.is_file() else None
        return FileFeatures(_load(path), corners)

    def file_digest(self, path: Path) -> bytes:
        coords = self.path / "coords" / path.name
        digest = file_digest(path) + (file_digest(coords) if coords.is_file() else b"")
        return hashlib.sha256(digest).digest()

    def _read_tables(self) -> Manifest:
        """The table that an export wrote; without it the names of classes are their numbers."""
        manifest = super()._read_tables()
        folder = self.path / "labels"
        if (self.path / TABLE).is_file() or not folder.is_dir():
            return manifest
        bags = [replace(b, labels=_labels(folder / f"{b.bag_id}.npy")) for b in manifest.bags]
        used = {label for bag in bags for label in bag.labels or ()}
        names = tuple(sorted(used, key=int))
        return replace(manifest, bags=tuple(bags), labels=names, task=infer_task(bags))


def _load(path: Path) -> Array:
    with open_regular(path) as file:
        values: Array = np.load(file, allow_pickle=False)
    return values


def _labels(path: Path) -> tuple[str, ...]:
    """Labels from one number, that of a class, or from a 0 or 1 for each label."""
    with reading(path, "a bag's label"):
        values = _load(path)
    flat = values.reshape(-1)
    whole = (
        flat.dtype.kind in "fiub" and np.isfinite(flat).all() and (flat == flat.astype(int)).all()
    )
    if whole and len(flat) == 1:
        return (str(int(flat[0])),)
    if whole and len(flat) > 1 and np.isin(flat, (0, 1)).all():
        return tuple(str(k) for k in np.flatnonzero(flat))
    raise InputError(
        str(path),
        expected="the number of a class, or a 0 or 1 for each label",
        got=f"{values.dtype} {values.shape}",
        remedy="correct it, or give the labels in a table of bags",
    )


class TorchmilTarget(Target):
    """Folders of ``.npy`` that torchmil's ``ProcessedMILDataset`` reads."""

    layout = "torchmil"

    def write(self, store: Store, tap: Tap, path: Path, advance: Callable[[], None]) -> None:
        labelled = all(bag.labels is not None for bag in store.bags) and bool(store.labels)
        for name in ("features", "coords", *(["labels"] if labelled else [])):
            path.joinpath(name).mkdir(parents=True)
        for exported in exported_bags(store, tap):
            name = f"{exported.bag.bag_id}.npy"
            np.save(path / "features" / name, exported.values)
            np.save(path / "coords" / name, exported.coords)
            if labelled:
                label = label_array(exported.bag, store.labels, store.task)
                np.save(path / "labels" / name, label)
            advance()
        write_tables(store, tap, path)


def label_array(bag: Bag, labels: Sequence[str], task: str) -> Array:
    """(1,) the number of the class, or (L,) 0 and 1 for each label."""
    has = np.array([label in (bag.labels or ()) for label in labels], np.int64)
    return np.flatnonzero(has).astype(np.int64) if task == "multiclass" else has
