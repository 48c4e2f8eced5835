"""HDF5 files that hold their own data.

A link, a virtual dataset or a dataset with external storage can make an HDF5 file show bytes of any
other file that its reader may open; a virtual dataset whose source is missing reads as zeros. Files
of others are therefore looked through by `leading_out`, and a part's datasets are opened by
`own_dataset`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import h5py


def own_dataset(file: Any, name: str) -> Any:
    """A dataset of a part; every step of its name is a link that a part is written with.

    Raises:
        KeyError: there is none of that name.
        ValueError: it leads to other files, or is no dataset.
    """
    inner = file.id
    for step in name.split("/"):
        if not isinstance(inner, h5py.h5g.GroupID | h5py.h5f.FileID):
            raise ValueError(f"{name} is no dataset")
        _require_hard(inner, step, name)
        inner = h5py.h5o.open(inner, step.encode())
    if not isinstance(inner, h5py.h5d.DatasetID):
        raise ValueError(f"{name} is no dataset")
    fault = _dataset_fault(inner)
    if fault is not None:
        raise ValueError(f"{name} is {fault}")
    return h5py.Dataset(inner)


def _require_hard(group: Any, step: str, name: str) -> None:
    if not group.links.exists(step.encode()):
        raise KeyError(name)
    if group.links.get_info(step.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{name} is behind a link")


def leading_out(
    file: Any, visit: Callable[[Any], object] = lambda inner: None
) -> Iterator[tuple[str, str]]:
    """The name and kind of everything that leads out of a file; without recursion.

    Soft links need no look: their way is by links that are all looked at here.

    Args:
        visit: called with each object of the file that holds its own data.
    """
    root = h5py.h5o.open(file.id, b"/")
    visit(root)
    known = {h5py.h5o.get_info(root).addr}
    groups = [("", root)]
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
                place = h5py.h5o.get_info(inner).addr
                if place in known:  # hard links can go in circles
                    continue
                known.add(place)
                fault = _dataset_fault(inner) if isinstance(inner, h5py.h5d.DatasetID) else None
                if fault is not None:
                    yield at, fault
                    continue
                visit(inner)
                if isinstance(inner, h5py.h5g.GroupID):
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
