"""Writing a manifest's tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from dragn_cache.manifest.dataset_toml import write_dataset_toml
from dragn_cache.manifest.records import BOX_COLUMNS, Bag, Manifest
from dragn_cache.manifest.tables import join_cell


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write dataset.toml, bags.csv and instances.csv; reading them gives an equal manifest.

    The image root is written relative to ``folder`` if it lies within, else absolute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root, base = manifest.image_root.resolve(), folder.resolve()
    images = root.relative_to(base) if root.is_relative_to(base) else root
    write_dataset_toml(manifest, folder / "dataset.toml", images=images.as_posix())
    write_bags(manifest.bags, folder / "bags.csv")
    with (folder / "instances.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["bag_id", "image", "order", *BOX_COLUMNS])
        for bag in manifest.bags:
            for row in manifest.instances.get(bag.bag_id, ()):
                image = join_cell([row.image])
                writer.writerow([row.bag_id, image, row.order, *(row.box or ("",) * 4)])


def write_bags(
    bags: Sequence[Bag], path: Path, *, added: Mapping[str, Sequence[object]] | None = None
) -> None:
    """Write a table of bags with all its columns; ``added`` maps further columns to values."""
    path.write_text(bags_text(bags, added=added), encoding="utf-8", newline="")


def bags_text(bags: Sequence[Bag], *, added: Mapping[str, Sequence[object]] | None = None) -> str:
    """The text that `write_bags` writes."""
    added = added or {}
    extra = list(dict.fromkeys(c for bag in bags for c in bag.extra if c not in added))
    labelled = any(bag.labels is not None for bag in bags)
    head = ["bag_id", *(["labels"] if labelled else []), "split", "group", *extra, *added]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for k, bag in enumerate(bags):
        writer.writerow(
            [
                bag.bag_id,
                *([join_cell(bag.labels or ())] if labelled else []),
                bag.split,
                bag.group,
                *(bag.extra.get(column, "") for column in extra),
                *(values[k] for values in added.values()),
            ]
        )
    return text.getvalue()
