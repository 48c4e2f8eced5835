"""HDF5 files that hold their own data.

A link, a virtual dataset or a dataset with external storage can make an HDF5 file show bytes of any
other file that its reader may open; a virtual dataset whose source is missing reads as zeros. Files
of others are therefore opened by `open_alone`, and a part's datasets by `own_dataset`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dragn_cache.errors import InputError
from dragn_cache.files import require_regular, require_room
from dragn_cache.store.part import Array


@contextmanager
def open_alone(path: Path) -> Iterator[Any]:
    """An HDF5 file, opened to be read, all of whose data lie in itself.

    Raises:
        InputError: a link or a dataset in it leads to other files.
    """
    with open_part(path) as file:
        require_alone(path, file)
        yield file


def open_part(path: Path) -> Any:
    """An HDF5 file, opened to be read, whose datasets are asked for by `own_dataset`."""
    require_regular(path)
    return h5py.File(path, "r")


def require_alone(path: Path, file: Any) -> None:
    """Raise `InputError` for a link or a dataset that leads out of its file."""
    # Soft links need no look: their way is by links that are all looked at here.
    found = next((f"{name}, {fault}" for name, fault in _outside(file)), None)
    if found is not None:
        raise InputError(
            str(path),
            expected="a file that holds all of its data",
            got=found,
            remedy="copy the data into the file, as h5repack and h5copy do",
        )


def own_dataset(file: Any, name: str) -> Any:
    """A dataset of a part; every step of its name is a link that a part is written with.

    Raises:
        KeyError: there is none of that name.
        ValueError: it leads to other files, or is no dataset.
    """
    group, *steps = file.id, *name.split("/")
    for step in steps[:-1]:
        _require_hard(group, step, name)
        group = h5py.h5o.open(group, step.encode())
        if not isinstance(group, h5py.h5g.GroupID):
            raise ValueError(f"{name} is no dataset")
    _require_hard(group, steps[-1], name)
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{name} is no dataset")
    fault = _dataset_fault(dataset.id)
    if fault is not None:
        raise ValueError(f"{name} is {fault}")
    return dataset


def read_whole(dataset: Any, *, text: bool = False) -> Array:
    """All values of a dataset, if there is room: one without any chunk has no bytes in the file,
    and as many of its fill value as its shape says."""
    require_room(dataset.size * dataset.dtype.itemsize)
    return np.asarray(dataset.asstr()[...] if text else dataset[...])


def _require_hard(group: Any, step: str, name: str) -> None:
    if not group.links.exists(step.encode()):
        raise KeyError(name)
    if group.links.get_info(step.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{name} is behind a link")


def _outside(file: Any) -> Iterator[tuple[str, str]]:
    """The name and kind of everything that leads out of a file; without recursion."""
    known: set[object] = set()
    groups = [("", file.id)]
    while groups:
        path, group = groups.pop()
        names: list[bytes] = []
        group.links.iterate(names.append)
        for name in names:
            at = f"{path}/{name.decode(errors='replace')}".lstrip("/")
            kind = group.links.get_info(name).type
            if kind == h5py.h5l.TYPE_EXTERNAL:
                target = group.links.get_val(name)[0].decode(errors="replace")
                yield at, f"a link to the file {target}"
            elif kind == h5py.h5l.TYPE_HARD:
                inner = h5py.h5o.open(group, name)
                if isinstance(inner, h5py.h5d.DatasetID):
                    fault = _dataset_fault(inner)
                    if fault is not None:
                        yield at, fault
                elif isinstance(inner, h5py.h5g.GroupID):
                    place = h5py.h5o.get_info(inner).addr
                    if place not in known:  # hard links can go in circles
                        known.add(place)
                        groups.append((at, inner))
            elif kind != h5py.h5l.TYPE_SOFT:
                yield at, "a link of a kind that HDF5 does not define"


def _dataset_fault(dataset: Any) -> str | None:
    """How a dataset leads out of its file, if it does."""
    creation = dataset.get_create_plist()
    if creation.get_layout() == h5py.h5d.VIRTUAL:
        return "a virtual dataset"
    if creation.get_external_count():
        name = creation.get_external(0)[0].decode(errors="replace")
        return f"stored in the file {name}"
    return None
