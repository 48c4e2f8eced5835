"""The layouts by name, and the recognition of one from file names and keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dragn_cache.errors import InputError
from dragn_cache.interop.anndata_file import AnnDataSource, AnnDataTarget
from dragn_cache.interop.h5_files import (
    ClamSource,
    ClamTarget,
    StampSource,
    TridentSource,
    TridentTarget,
)
from dragn_cache.interop.npy_files import NpySource, TorchmilSource, TorchmilTarget
from dragn_cache.interop.npz_file import NpzSource
from dragn_cache.interop.source import Source, reading
from dragn_cache.interop.target import Target
from dragn_cache.interop.tensor_files import TensorSource
from dragn_cache.interop.whole_file import Hdf5Source, Hdf5Target, ZarrSource, ZarrTarget
from dragn_cache.store.hdf5_trial import open_alone

SOURCES: dict[str, type[Source]] = {
    "clam": ClamSource,
    "trident": TridentSource,
    "stamp": StampSource,
    "pt": TensorSource,
    "npy": NpySource,
    "torchmil": TorchmilSource,
    "npz": NpzSource,
    "anndata": AnnDataSource,
    "hdf5": Hdf5Source,
    "zarr": ZarrSource,
}
TARGETS: dict[str, type[Target]] = {
    "clam": ClamTarget,
    "trident": TridentTarget,
    "torchmil": TorchmilTarget,
    "hdf5": Hdf5Target,
    "zarr": ZarrTarget,
    "anndata": AnnDataTarget,
}
# Layouts by the ending of a single file, or by the only ending in a folder.
ENDINGS = {".npz": "npz", ".h5ad": "anndata", ".pt": "pt", ".npy": "npy"}


@dataclass(frozen=True)
class Glimpse:
    """A look at a source that reads no features: its file names and HDF5 keys.

    Attributes:
        files: paths below the source, ``/``-separated; of a single file its name.
        keys: names at the top of the first ``.h5``; ``features@encoder`` is an attribute.
    """

    is_folder: bool
    files: tuple[str, ...]
    keys: frozenset[str] = frozenset()


def recognise(seen: Glimpse) -> str | None:
    """The layout of a source; None where no layout, or more than one, is possible."""
    folders = {PurePosixPath(file).parts[0] for file in seen.files if "/" in file}
    endings = {PurePosixPath(file).suffix for file in seen.files} & {".h5", *ENDINGS}
    if not seen.is_folder:
        return _by_keys(seen.keys) if endings == {".h5"} else _by_ending(endings)
    if "zarr.json" in seen.files and {"taps", "store"} <= folders:
        return "zarr"
    if "h5_files" in folders and any(f.startswith("h5_files/") for f in seen.files):
        return "clam"
    if any(f.startswith("features/") and f.endswith(".npy") for f in seen.files):
        return "torchmil"
    return _by_keys(seen.keys) if endings == {".h5"} else _by_ending(endings - {".npz", ".h5ad"})


def _by_ending(endings: set[str]) -> str | None:
    return ENDINGS.get(next(iter(endings))) if len(endings) == 1 else None


def _by_keys(keys: frozenset[str]) -> str | None:
    if {"taps", "store"} <= keys:
        return "hdf5"
    if "feats" in keys:
        return "stamp"
    if "features" in keys:
        return "trident" if "features@encoder" in keys else "clam"
    return None


def find_layout(path: Path) -> str:
    """Look at a source and name its layout.

    Raises:
        InputError: there is nothing at the path, or no layout that can be read.
    """
    glimpse = _look(path)
    layout = recognise(glimpse)
    if layout is not None:
        return layout
    got = "no such file or folder"
    if path.exists():
        endings = sorted({PurePosixPath(f).suffix or f for f in glimpse.files})
        got = "a store" if "store.json" in glimpse.files else f"files {', '.join(endings[:5])}"
    raise InputError(
        str(path),
        expected=f"features in one of the layouts {', '.join(SOURCES)}",
        got=got if glimpse.files or not path.exists() else "an empty folder",
        remedy="correct the path, or say which with `layout`",
    )


def _look(path: Path) -> Glimpse:
    if not path.is_dir():
        return Glimpse(False, (path.name,), _h5_keys(path) if path.is_file() else frozenset())
    if (path / "zarr.json").is_file():
        names = [p.name + ("/" if p.is_dir() else "") for p in path.iterdir()]
        return Glimpse(True, tuple(sorted(names)))
    files = sorted(p for p in path.rglob("*") if p.is_file())
    shown = [p.relative_to(path).as_posix() for p in files]
    shown = [f for f in shown if not any(part.startswith(".") for part in f.split("/"))]
    first = next((f for f in sorted(shown, key=_features_first) if f.endswith(".h5")), None)
    return Glimpse(True, tuple(shown), _h5_keys(path / first) if first else frozenset())


def _features_first(file: str) -> tuple[bool, str]:
    """Sort key: a TRIDENT job also has patches/*.h5, which hold no features."""
    return (not any(part.startswith("features_") for part in file.split("/")), file)


def _h5_keys(path: Path) -> frozenset[str]:
    if path.suffix != ".h5":
        return frozenset()
    with reading(path, "an HDF5 file"), open_alone(path) as file:
        keys = set(file)
        if "features" in keys and "encoder" in file["features"].attrs:
            keys.add("features@encoder")
        return frozenset(keys)
