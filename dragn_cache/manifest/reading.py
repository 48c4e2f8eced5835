"""Reading a manifest: the instances of each bag, and the bag's labels, split and group.

`manifest.sources` finds its tables. Reading never opens an image. Every fault in the tables is
collected with its file and line; `read_manifest` raises the first that makes the manifest unusable,
`read_with_faults` returns them all.

Ids are text from beginning to end: leading zeros, ``NA`` and ``nan`` survive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dragn_cache.errors import ManifestError
from dragn_cache.files import is_storable
from dragn_cache.manifest.faults import (
    check_bags,
    check_bags_have_images,
    check_channels,
    check_groups,
    check_images_have_bags,
    leaves_root,
)
from dragn_cache.manifest.records import BOX_COLUMNS, Bag, Instance, Manifest
from dragn_cache.manifest.sources import Source, find_source
from dragn_cache.manifest.tables import Fault, Row, read_table, split_cell
from dragn_cache.types import Box, Task

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".tif", ".tiff")
# Column names, ours and those of other tools; the first one that a table has is used.
BAG_COLUMNS = ("bag_id", "slide_id", "slide", "gene_stage", "PATIENT", "patient")
IMAGE_COLUMNS = ("image", "FILENAME", "filename", "imgs")
LABEL_COLUMNS = ("labels", "label", "category")
GROUP_COLUMNS = ("group", "case_id", "patient", "PATIENT")

# Faults that leave a manifest usable: extract and train decide about them by their settings.
TOLERATED = frozenset({"bag-without-images", "group-straddles-splits"})


# --- reading -----------------------------------------------------------------------------------


def read_manifest(dataset: str | Path, *, images: Path | None = None) -> Manifest:
    """Read a data set's manifest, or raise `ManifestError` for the first unusable row.

    Args:
        dataset: a shipped name, a folder with dataset.toml, a CSV, or a folder of bag folders.
        images: image root that replaces the manifest's own.
    """
    manifest, faults = read_with_faults(dataset, images=images)
    fatal = [fault for fault in faults if fault.kind not in TOLERATED]
    if fatal:
        raise fatal[0].error(len(fatal) - 1)
    return manifest


def read_with_faults(
    dataset: str | Path, *, images: Path | None = None
) -> tuple[Manifest, list[Fault]]:
    """Read a data set's manifest and list every fault of its tables (images are not opened)."""
    source = find_source(dataset, images=images)
    faults: list[Fault] = []
    bags = _read_bag_table(source.bags, faults, images_elsewhere=source.bags != source.instances)
    with_images: set[str] = set()
    instances = _read_instances(source, faults, with_images)
    declared = source.toml.get("labels")
    labels = tuple(declared) if declared else _labels_in_use(bags)
    task = source.toml.get("task") or infer_task(bags)
    faults += check_bags(bags, labels, task)
    known = {bag.bag_id for bag in bags}
    faults += check_images_have_bags(instances, known, source.bags.name)
    faults += check_bags_have_images(bags, with_images)
    faults += check_groups(bags)
    manifest = Manifest(
        name=source.name,
        task=task,
        labels=labels,
        bags=tuple(bags),
        instances=_by_bag(instances, known),
        image_root=source.image_root,
        channels=tuple(source.toml.get("channels", ())),
        title=source.toml.get("title", ""),
        source=source.toml.get("source", ""),
        licence=source.toml.get("licence", ""),
        citation=source.toml.get("citation", ""),
        extract=source.toml.get("extract", {}),
    )
    faults += check_channels(manifest)
    return manifest, faults


def read_bags(
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    task: Task | None = None,
    image_rows: bool = False,
) -> tuple[tuple[Bag, ...], tuple[str, ...], Task]:
    """Read a table of bags alone: labels, splits and groups for features that exist already.

    Args:
        path: a CSV with ``bag_id`` and any of ``labels, split, group``.
        labels: the label order; read from the table when None.
        task: inferred from the table when None.
        image_rows: whether a column of images means one row for each image, as in tables of others;
            else such columns are kept like any other, and every bag has one row.

    Returns:
        the bags, the label order and the task.

    Raises:
        ManifestError: for the first fault of the table.
    """
    faults: list[Fault] = []
    bags = _read_bag_table(path, faults, images_elsewhere=not image_rows)
    order = tuple(labels) if labels else _labels_in_use(bags)
    chosen: Task = task or infer_task(bags)
    faults += check_bags(bags, order, chosen)
    if faults:
        raise faults[0].error(len(faults) - 1)
    return tuple(bags), order, chosen


def columns_given(path: Path) -> set[str]:
    """Those of ``labels``, ``split`` and ``group`` for which a table of bags has a column."""
    columns = [column for row in read_table(path)[:1] for column in row.cells]
    _, label_column, group_column = _bag_columns(path, columns)
    present = {"labels": label_column, "group": group_column, "split": "split" in columns}
    return {name for name, is_present in present.items() if is_present}


def infer_task(bags: Sequence[Bag]) -> Task:
    """Multi-class when every bag has exactly one label and there are several, else multi-label."""
    counts = {len(bag.labels) for bag in bags if bag.labels is not None}
    return "multiclass" if counts == {1} and len(_labels_in_use(bags)) > 1 else "multilabel"


# --- the tables --------------------------------------------------------------------------------


def _read_bag_table(path: Path, faults: list[Fault], *, images_elsewhere: bool) -> list[Bag]:
    """Bags in order of first appearance; a table with one row per image repeats its bags."""
    rows = read_table(path)
    if not rows:
        raise ManifestError(
            str(path), expected="bags", got="no row below the header", remedy="add a row per bag"
        )
    columns = rows[0].cells.keys()
    id_column, label_column, group_column = _bag_columns(path, columns)
    one_row_per_image = not images_elsewhere and any(c in columns for c in IMAGE_COLUMNS)
    skip = {id_column, label_column, group_column, "split"}
    skip |= {"order", *IMAGE_COLUMNS, *BOX_COLUMNS} if one_row_per_image else set()
    bags: dict[str, Bag] = {}
    for row in rows:
        bag_id = row.cells[id_column]
        if not bag_id:
            faults.append(row.fault("empty-id", "a bag id", "an empty cell", "fill it in"))
            continue
        bag = Bag(
            bag_id=bag_id,
            labels=split_cell(row.cells[label_column]) if label_column else None,
            split=_split_name(row),
            group=row.cells[group_column] if group_column else "",
            extra={k: v for k, v in row.cells.items() if k not in skip},
            file=row.file,
            line=row.line,
        )
        first = bags.setdefault(bag_id, bag)
        if first is bag:
            continue
        if not one_row_per_image:
            got = f"{bag_id!r} again (first at line {first.line})"
            faults.append(row.fault("duplicate-bag", "one row per bag", got, "remove one of them"))
        elif (first.labels, first.split, first.group) != (bag.labels, bag.split, bag.group):
            got = f"other values for {bag_id!r} than at line {first.line}"
            faults.append(
                row.fault(
                    "inconsistent-bag", "one labels, split and group a bag", got, "make them equal"
                )
            )
    return list(bags.values())


def _bag_columns(path: Path, columns: Iterable[str]) -> tuple[str, str | None, str | None]:
    """The names of the columns of ids, labels and groups."""
    id_column = _column(path, columns, BAG_COLUMNS, "bag ids")
    label_column = next((c for c in LABEL_COLUMNS if c in columns), None)
    group_column = next((c for c in GROUP_COLUMNS if c in columns and c != id_column), None)
    return id_column, label_column, group_column


def _split_name(row: Row) -> str:
    split = row.cells.get("split", "")
    return "validation" if split == "val" else split


def _read_instances(source: Source, faults: list[Fault], with_images: set[str]) -> list[Instance]:
    """Instances in table order; add the bags of all rows, faulty ones too, to ``with_images``."""
    if source.folders is not None:
        instances = list(_walk_folders(source.folders))
        faults += [
            Fault(
                "bad-path",
                ascii(row.image),
                0,
                "a name in UTF-8",
                "other bytes",
                "rename the file or folder",
            )
            for row in instances
            if not is_storable(row.image)
        ]
        with_images |= {row.bag_id for row in instances}
        return instances
    if source.instances is None or not (rows := read_table(source.instances)):
        return []
    columns = rows[0].cells.keys()
    id_column = _column(source.instances, columns, BAG_COLUMNS, "bag ids")
    image_column = _column(source.instances, columns, IMAGE_COLUMNS, "image paths")
    boxed = _has_boxes(source.instances, columns)
    result: list[Instance] = []
    line_of: dict[tuple[str, str, Box | None], int] = {}
    for row in rows:
        bag_id = row.cells[id_column]
        if not bag_id:
            if source.instances != source.bags:  # else reading the bags has added the fault
                faults.append(row.fault("empty-id", "a bag id", "an empty cell", "fill it in"))
            continue
        with_images.add(bag_id)
        order, box = _order(row, faults), _box(row) if boxed else None
        if isinstance(box, Fault):
            faults.append(box)
            continue
        for image in split_cell(row.cells[image_column]) or ("",):
            fault = _instance_fault(row, image, line_of.get((bag_id, image, box)))
            if fault is not None:
                faults.append(fault)
                continue
            line_of[bag_id, image, box] = row.line
            place = len(result) if order is None else order
            result.append(Instance(bag_id, image, place, box, row.file, row.line))
    return result


def _has_boxes(path: Path, columns: Iterable[str]) -> bool:
    boxed = [c for c in BOX_COLUMNS if c in columns]
    if 0 < len(boxed) < 4:
        raise ManifestError(
            f"{path}:1",
            expected="all of x0, y0, x1, y1, or none",
            got=", ".join(boxed),
            remedy="add the missing columns",
        )
    return bool(boxed)


def _instance_fault(row: Row, image: str, first_line: int | None) -> Fault | None:
    if not image or leaves_root(image) or not is_storable(image):
        return row.fault(
            "bad-path",
            "an image path inside the image root",
            repr(image),
            "write it relative to the image root",
        )
    if first_line is not None:
        got = f"the same bag, image and box as line {first_line}"
        return row.fault("duplicate-instance", "a new instance", got, "remove it")
    return None


def _order(row: Row, faults: list[Fault]) -> int | None:
    text = row.cells.get("order", "")
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        faults.append(row.fault("bad-order", "a whole number", repr(text), "correct it"))
        return None


def _box(row: Row) -> Box | Fault | None:
    cells = [row.cells[c] for c in BOX_COLUMNS]
    if not any(cells):
        return None
    got = f"({', '.join(cells)})"
    try:
        x0, y0, x1, y1 = (int(c) for c in cells)
    except ValueError:
        return row.fault("bad-box", "four whole numbers x0, y0, x1, y1", got, "correct it")
    if x0 < 0 or y0 < 0:
        return row.fault("box-outside-image", "x0 ≥ 0 and y0 ≥ 0", got, "correct the box")
    if x1 <= x0 or y1 <= y0:
        return row.fault("bad-box", "x0 < x1 and y0 < y1", got, "correct the box")
    return x0, y0, x1, y1


def _walk_folders(root: Path) -> Iterator[Instance]:
    """Images below each folder of ``root``, without hidden ones: programs make them, not the user
    (.ipynb_checkpoints, ._x.png)."""
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        paths = (
            p.relative_to(root) for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES
        )
        visible = [p for p in paths if not any(part.startswith(".") for part in p.parts)]
        images = sorted(visible, key=_natural_order)
        for order, image in enumerate(images):
            path = image.as_posix()
            yield Instance(bag_id=folder.name, image=path, order=order, file=path)


def _natural_order(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key by which 2.png comes before 10.png."""
    pieces = re.findall(r"\d+|\D+", path.as_posix())
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in pieces]


def _column(path: Path, columns: Iterable[str], names: Sequence[str], what: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise ManifestError(
        f"{path}:1",
        expected=f"a column of {what}, {names[0]!r} (or {', '.join(names[1:])})",
        got=f"columns {', '.join(columns)}",
        remedy="rename the column",
    )


def _labels_in_use(bags: Sequence[Bag]) -> tuple[str, ...]:
    return tuple(sorted({label for bag in bags for label in bag.labels or ()}))


def _by_bag(instances: Sequence[Instance], known: set[str]) -> dict[str, tuple[Instance, ...]]:
    grouped: dict[str, list[Instance]] = {}
    for row in instances:
        if row.bag_id in known:
            grouped.setdefault(row.bag_id, []).append(row)
    result = {}
    for bag_id, rows in grouped.items():
        ordered = sorted(rows, key=lambda row: row.order)
        result[bag_id] = tuple(replace(row, order=k) for k, row in enumerate(ordered))
    return result
