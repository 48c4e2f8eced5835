"""Join a data set's tables with its images and list every fault, before any network starts.

Faults make a data set unusable, or a part of it. Doubts do not: names that look alike, images that
bags share, pixels that fill few of the grey levels.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from dragn_cache.backbone_input import Intensity
from dragn_cache.errors import ImageError
from dragn_cache.extraction.config import CheckConfig
from dragn_cache.images.crops import Examined, examine_image
from dragn_cache.images.intensity import few_levels, scale
from dragn_cache.images.notes import listening
from dragn_cache.manifest import Instance, Manifest, read_with_faults
from dragn_cache.manifest.doubts import check_doubts
from dragn_cache.manifest.faults import leaves_root
from dragn_cache.manifest.shared import find_shared, image_keys
from dragn_cache.manifest.tables import Fault
from dragn_cache.texts import by_look, difference, look
from dragn_cache.types import Progress


@dataclass(frozen=True)
class CheckReport:
    """A data set as read, the number of its images, every fault of its tables and images, and what
    may be meant as it is and misleads where it is not."""

    manifest: Manifest
    images: int
    faults: tuple[Fault, ...]
    doubts: tuple[Fault, ...]


@dataclass
class _Seen:
    """What the images have shown so far.

    Attributes:
        rows: instances of images that could be read; ``keys``: what they show, see `image_keys`.
        numbers: the lowest and the highest of all pixels that are scaled by a fixed range.
        levels: the same of what they become; ``full``: the largest number of their bits.
        first: an instance of the first such image.
    """

    rows: list[Instance] = field(default_factory=list)
    keys: array[int] = field(default_factory=lambda: array("Q"))
    numbers: tuple[float, float] = (np.inf, -np.inf)
    levels: tuple[int, int] = (255, 0)
    full: float = 0.0
    first: Instance | None = None

    def add(self, image: Examined, rows: Sequence[Instance], intensity: Intensity) -> None:
        """Remember one image and its instances."""
        if image.digest is not None:
            boxes = np.array([row.box or (0, 0, *image.size) for row in rows])
            digests = np.tile(np.frombuffer(image.digest, np.uint8), (len(rows), 1))
            self.keys.extend(image_keys(digests, boxes).tolist())
            self.rows += rows
        low, high = 0.0, image.full
        if intensity.kind == "range":
            low, high = intensity.low, intensity.high
        if high is None or intensity.kind not in ("full", "range"):
            return  # percentiles fill all levels
        lowest, highest = scale(np.array([image.lowest, image.highest]), low, high).tolist()
        self.levels = min(self.levels[0], lowest), max(self.levels[1], highest)
        numbers = self.numbers
        self.numbers = min(numbers[0], image.lowest), max(numbers[1], image.highest)
        self.full = max(self.full, image.full or 0)
        self.first = self.first or rows[0]


def check_dataset(
    dataset: str | Path,
    config: CheckConfig | None = None,
    *,
    images: Path | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Read the tables, decode every image (all its channels), and compare boxes with sizes.

    Args:
        dataset: as `read_manifest` takes it.
        images: image root that replaces the manifest's own.
        progress: called with images done and images in total.

    Raises:
        ManifestError: a table or dataset.toml cannot be read at all.
    """
    manifest, faults = read_with_faults(dataset, images=images)
    by_image: dict[str, list[Instance]] = {}
    for rows in manifest.instances.values():
        for row in rows:
            by_image.setdefault(row.image, []).append(row)
    # Those whose channels name no file, or one outside the image root, are listed already.
    paths = [p for p in by_image if _may_be_read(manifest, p)]
    intensity = Intensity.parse(str(manifest.extract.get("intensity", "full")))
    seen, folders = _Seen(), _Folders(manifest.image_root)
    doubts = check_doubts(manifest.bags, manifest.task)
    with listening(), ThreadPoolExecutor((config or CheckConfig()).workers) as pool:
        for done, result in enumerate(pool.map(partial(_examined, manifest), paths), start=1):
            users = by_image[paths[done - 1]]
            faults += _image_faults(result, users, folders)
            if isinstance(result, Examined):
                seen.add(result, users, intensity)
                doubts += _remarks(result, users[0])
            if progress is not None:
                progress(done, len(paths))
    doubts += _shared_images(manifest, seen) + _few_levels(seen, intensity)
    return CheckReport(manifest, len(paths), tuple(faults), tuple(doubts))


def _may_be_read(manifest: Manifest, image: str) -> bool:
    """Whether a path names files inside the image root, for all channels."""
    files = _files_of(manifest, image)
    return bool(files) and not any(map(leaves_root, files))


def _files_of(manifest: Manifest, image: str) -> list[str]:
    """The files behind an image's path, one for each channel if it has ``{channel}``."""
    if "{channel}" not in image:
        return [image]
    return [image.replace("{channel}", channel) for channel in manifest.channels]


def _examined(manifest: Manifest, image: str) -> Examined | ImageError:
    """The facts of an image that can be decoded, all its channels."""
    files = [manifest.image_root / name for name in _files_of(manifest, image)]
    try:
        return examine_image(image, files, len(manifest.channels))
    except ImageError as error:
        return error


class _Folders:
    """The names in the folders of images, by their looks, to find what a missing name meant."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[Path, dict[str, str]] = {}

    def hint(self, image: str) -> str:
        """What a missing file is perhaps called, as the beginning of a remedy."""
        path = self.root / image
        if path.parent not in self._names:
            names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            self._names[path.parent] = by_look(names)
        other = self._names[path.parent].get(look(path.name))
        if other is None or other == path.name:
            return ""
        return f"did you mean {other!r} (they differ by {difference(path.name, other)})? otherwise "


def _image_faults(
    result: Examined | ImageError, rows: Sequence[Instance], folders: _Folders
) -> list[Fault]:
    if isinstance(result, ImageError):
        kind = "missing-file" if result.got == "no such file" else "unreadable-image"
        got, remedy = f"{result.got} ({result.where})", result.remedy
        if kind == "missing-file":
            remedy = folders.hint(rows[0].image) + remedy
        fault = Fault(kind, rows[0].file, rows[0].line, result.expected, got, remedy)
        return [replace(fault, file=row.file, line=row.line) for row in rows]
    width, height = result.size
    return [
        Fault(
            "box-outside-image",
            row.file,
            row.line,
            f"a box inside {width}×{height} pixels (w×h)",
            str(row.box),
            "correct the box",
        )
        for row in rows
        if row.box is not None and (row.box[2] > width or row.box[3] > height)
    ]


# --- doubts ------------------------------------------------------------------------------------


def _remarks(image: Examined, row: Instance) -> list[Fault]:
    """A doubt if a decoder had a remark on an image, the first of its remarks."""
    expected, remedy = "no remark of its decoder", "look at it, and save it anew if it looks wrong"
    return [
        Fault("decoder-remark", row.file, row.line, expected, f"{note!r} ({row.image})", remedy)
        for note in image.notes[:1]
    ]


def _shared_images(manifest: Manifest, seen: _Seen) -> list[Fault]:
    """A doubt for every two bags that share images and may come to lie on two sides of a split."""
    if not seen.rows:
        return []
    number = {bag.bag_id: k for k, bag in enumerate(manifest.bags)}
    members = np.array([number[row.bag_id] for row in seen.rows])
    keys = np.array(seen.keys, np.uint64)
    splits = [bag.split for bag in manifest.bags]
    pairs = find_shared(manifest.bags, members, keys, splits if all(splits) else None)
    row_of: dict[tuple[int, int], Instance] = {}
    for place in np.flatnonzero(np.isin(keys, np.array([p.key for p in pairs], np.uint64))):
        row_of.setdefault((int(members[place]), int(keys[place])), seen.rows[place])
    doubts = []
    for pair in pairs:
        first, other = row_of[pair.first, pair.key], row_of[pair.other, pair.key]
        more = f" (and {pair.images - 1} more)" if pair.images > 1 else ""
        doubts.append(
            Fault(
                "shared-image",
                other.file,
                other.line,
                "images that no bag of another group or side has",
                f"the pixels of {first.image!r} of bag {first.bag_id!r} in {other.image!r} of bag "
                f"{other.bag_id!r}{more}",
                "give the two bags one group, or remove one of them",
            )
        )
    return doubts


def _few_levels(seen: _Seen, intensity: Intensity) -> list[Fault]:
    """A doubt if all images together fill few of the 256 grey levels."""
    if seen.first is None or not few_levels(seen.levels):
        return []
    bits = int(seen.numbers[1]).bit_length()
    remedy = "give `intensity=percentile:0.1:99.9`, or the range that the numbers have as LOW:HIGH"
    if intensity.kind == "full" and 2**bits - 1 < seen.full:
        remedy = f"give `intensity=0:{2**bits - 1}` if they are of {bits} bits, or a percentile"
    return [
        Fault(
            "few-grey-levels",
            seen.first.file,
            seen.first.line,
            f"pixels that fill the 256 grey levels of `intensity={intensity}`",
            f"numbers from {seen.numbers[0]:g} to {seen.numbers[1]:g} in all images, which become "
            f"levels {seen.levels[0]} to {seen.levels[1]}",
            remedy,
        )
    ]
