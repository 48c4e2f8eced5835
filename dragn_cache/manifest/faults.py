"""Faults of a manifest: orphans, bags without images, unknown labels, straddling groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dragn_cache.errors import UnknownNameError, likely
from dragn_cache.files import is_storable
from dragn_cache.manifest.records import Bag, Instance, Manifest
from dragn_cache.manifest.tables import Fault
from dragn_cache.texts import by_look, difference, look
from dragn_cache.types import SPLITS, Task

LABEL_REMEDY = "correct it, or add it to the labels of dataset.toml"


def check_bags(bags: Sequence[Bag], labels: Sequence[str], task: Task) -> list[Fault]:
    """Faults of labels and split names."""
    faults = []
    known = set(labels)
    for bag in bags:

        def fault(kind: str, expected: str, got: str, remedy: str, bag: Bag = bag) -> Fault:
            return Fault(kind, bag.file, bag.line, expected, got, remedy)

        texts = (bag.bag_id, bag.group, *(bag.labels or ()), *bag.extra.values())
        for text in texts:
            if not is_storable(text):
                expected = "UTF-8 text without null characters"
                faults.append(fault("bad-text", expected, ascii(text), "correct or rename it"))
        for label in bag.labels or ():
            if label not in known:
                hint = UnknownNameError("label", label, labels, remedy=LABEL_REMEDY).remedy
                faults.append(fault("unknown-label", "a known label", repr(label), hint))
        if task == "multiclass" and bag.labels is not None and len(bag.labels) != 1:
            faults.append(
                fault(
                    "label-count",
                    "exactly one label (task = multiclass)",
                    f"{len(bag.labels)} for bag {bag.bag_id!r}",
                    "give one label, or set task = 'multilabel'",
                )
            )
        if bag.split not in ("", *SPLITS):
            meant = likely(bag.split, SPLITS)
            hint = f"did you mean {meant}? otherwise " if meant else ""
            faults.append(
                fault(
                    "unknown-split",
                    "train, validation or test",
                    repr(bag.split),
                    f"{hint}correct it or leave it empty",
                )
            )
    return faults


def check_groups(bags: Sequence[Bag]) -> list[Fault]:
    """A fault for each bag that is in another split than the first bag of its group."""
    first_of_group: dict[str, Bag] = {}
    faults = []
    for bag in bags:
        if not bag.group or not bag.split:
            continue
        other = first_of_group.setdefault(bag.group, bag)
        if other.split != bag.split:
            faults.append(
                Fault(
                    "group-straddles-splits",
                    bag.file,
                    bag.line,
                    f"group {bag.group!r} in one split",
                    f"{bag.split!r} here and {other.split!r} at line {other.line}",
                    "put the whole group into one split",
                )
            )
    return faults


def check_images_have_bags(
    instances: Sequence[Instance], known: set[str], table: str
) -> list[Fault]:
    """One fault for each bag that has images but no row in the table of bags."""
    faults = {}
    alike: dict[str, str] = {}
    for row in instances:
        if row.bag_id not in known and row.bag_id not in faults:
            alike = alike or by_look(known)
            other = alike.get(look(row.bag_id))
            but = f", while {other!r} is one: {difference(row.bag_id, other)}" if other else ""
            faults[row.bag_id] = Fault(
                "image-without-bag",
                row.file,
                row.line,
                f"a bag of {table}",
                f"{row.bag_id!r}{but}",
                f"add a row for it to {table}, or remove its images",
            )
    return list(faults.values())


def check_bags_have_images(bags: Sequence[Bag], with_images: set[str]) -> list[Fault]:
    """A fault for each bag without images."""
    return [
        Fault(
            "bag-without-images",
            bag.file,
            bag.line,
            "at least one image",
            f"none for bag {bag.bag_id!r}",
            "add its images, remove the bag, or extract with `on_error=skip`",
        )
        for bag in bags
        if bag.bag_id not in with_images
    ]


def check_channels(manifest: Manifest) -> list[Fault]:
    """Faults of image paths with ``{channel}``: no channels for it, or one that leaves the root.

    One fault for each name that leads out; it is the same for all images.
    """
    faults: dict[str, Fault] = {}
    for rows in manifest.instances.values():
        for row in rows:
            if "{channel}" not in row.image:
                continue
            if not manifest.channels:
                return [
                    Fault(
                        "no-channels",
                        row.file,
                        row.line,
                        "channels in dataset.toml, because an image path has {channel}",
                        "none",
                        'add for example: channels = ["red", "green", "blue"]',
                    )
                ]
            for channel in manifest.channels:
                path = row.image.replace("{channel}", channel)
                if channel not in faults and leaves_root(path):
                    faults[channel] = Fault(
                        "bad-path",
                        row.file,
                        row.line,
                        "image paths inside the image root for every channel",
                        repr(path),
                        f"rename the channel {channel!r}",
                    )
    return list(faults.values())


def leaves_root(image: str) -> bool:
    """Whether a path's text leads out of the folder that it is below.

    A link that somebody made in that folder is another matter: it is followed.
    """
    return Path(image).is_absolute() or ".." in Path(image).parts
