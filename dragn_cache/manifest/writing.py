"""Writing a manifest's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dragn_cache.errors import InputError
from dragn_cache.files import LONGEST_CELL, csv_text, is_storable, write_text
from dragn_cache.manifest.dataset_toml import write_dataset_toml
from dragn_cache.manifest.records import BOX_COLUMNS, Bag, Manifest
from dragn_cache.manifest.tables import join_cell, split_cell

_REMEDY = "correct it where it comes from"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write dataset.toml, bags.csv and instances.csv; reading them gives an equal manifest.

    The image root is written relative to ``folder`` if it lies within, else absolute.
    """
    root, base = manifest.image_root.resolve(), folder.resolve()
    images = root.relative_to(base) if root.is_relative_to(base) else root
    bags = bags_text(manifest.bags)  # all that may be refused comes before anything is written
    rows = [row for bag in manifest.bags for row in manifest.instances.get(bag.bag_id, ())]
    for row in rows:
        require_held(f"bag {row.bag_id[:60]!r}", "image", row.image)
    cells = (
        [row.bag_id, join_cell([row.image]), row.order, *(row.box or ("",) * 4)] for row in rows
    )
    text = csv_text(["bag_id", "image", "order", *BOX_COLUMNS], cells)
    folder.mkdir(parents=True, exist_ok=True)
    write_dataset_toml(manifest, folder / "dataset.toml", images=images.as_posix())
    write_text(folder / "bags.csv", bags)
    write_text(folder / "instances.csv", text)


def write_bags(
    bags: Sequence[Bag], path: Path, *, added: Mapping[str, Sequence[object]] | None = None
) -> None:
    """Write a table of bags with all its columns; ``added`` maps further columns to values."""
    write_text(path, bags_text(bags, added=added))


def bags_text(bags: Sequence[Bag], *, added: Mapping[str, Sequence[object]] | None = None) -> str:
    """The text that `write_bags` writes.

    Raises:
        InputError: an id, a label or another cell that would be read back as another text.
    """
    require_held_bags(bags)
    added = added or {}
    extra = list(dict.fromkeys(c for bag in bags for c in bag.extra if c not in added))
    labelled = any(bag.labels is not None for bag in bags)
    head = ["bag_id", *(["labels"] if labelled else []), "split", "group", *extra, *added]
    rows = (
        [
            bag.bag_id,
            *([join_cell(bag.labels or ())] if labelled else []),
            bag.split,
            bag.group,
            *(bag.extra.get(column, "") for column in extra),
            *(values[k] for values in added.values()),
        ]
        for k, bag in enumerate(bags)
    )
    return csv_text(head, rows)


def require_held_bags(bags: Sequence[Bag]) -> None:
    """Raise `InputError` for the first bag of which a table would give back another text."""
    ids: set[str] = set()
    for bag in bags:
        where = f"bag {bag.bag_id[:60]!r}"
        if not bag.bag_id or bag.bag_id in ids:
            got = "an id that another bag has" if bag.bag_id else "an empty id"
            raise InputError(where, expected="ids that tell bags apart", got=got, remedy=_REMEDY)
        ids.add(bag.bag_id)
        cells = {"bag_id": bag.bag_id, "split": bag.split, "group": bag.group, **bag.extra}
        for column, cell in cells.items():
            require_held(where, column, cell)
        require_held_labels(where, bag.labels or ())


def require_held_labels(where: str, labels: Sequence[str]) -> None:
    """Raise `InputError` for labels that a table's cell would give back as others."""
    if split_cell(join_cell(labels)) != tuple(labels):
        raise InputError(
            f"{where}, labels",
            expected="labels without space around them, none empty and none twice",
            got=repr(labels),
            remedy=_REMEDY,
        )
    require_held(where, "labels", join_cell(labels))


def require_held(where: str, column: str, cell: str) -> None:
    """Raise `InputError` for a text that a table's cell would give back as another one."""
    if not is_storable(cell):
        fault = "a null character or no UTF-8"
    elif cell != cell.strip():
        fault = "space around it"
    elif len(cell) > LONGEST_CELL:
        fault = f"{len(cell)} characters, more than {LONGEST_CELL}"
    else:
        return
    raise InputError(
        f"{where}, {column}",
        expected="a text that a table can hold",
        got=f"{cell[:60]!r}: {fault}",
        remedy=_REMEDY,
    )
