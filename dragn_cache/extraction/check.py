"""Join a data set's tables with its images and list every fault, before any network starts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dragn_cache.errors import ImageError
from dragn_cache.extraction.config import CheckConfig
from dragn_cache.images.crops import decoded_size
from dragn_cache.manifest import Instance, Manifest, read_with_faults
from dragn_cache.manifest.faults import leaves_root
from dragn_cache.manifest.tables import Fault
from dragn_cache.types import Progress


@dataclass(frozen=True)
class CheckReport:
    """A data set as read, the number of its images, and every fault of its tables and images."""

    manifest: Manifest
    images: int
    faults: tuple[Fault, ...]


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
    with ThreadPoolExecutor((config or CheckConfig()).workers) as pool:
        for done, result in enumerate(pool.map(partial(_image_size, manifest), paths), start=1):
            faults += _image_faults(result, by_image[paths[done - 1]])
            if progress is not None:
                progress(done, len(paths))
    return CheckReport(manifest, len(paths), tuple(faults))


def _may_be_read(manifest: Manifest, image: str) -> bool:
    """Whether a path names files inside the image root, for all channels."""
    files = _files_of(manifest, image)
    return bool(files) and not any(map(leaves_root, files))


def _files_of(manifest: Manifest, image: str) -> list[str]:
    """The files behind an image's path, one for each channel if it has ``{channel}``."""
    if "{channel}" not in image:
        return [image]
    return [image.replace("{channel}", channel) for channel in manifest.channels]


def _image_size(manifest: Manifest, image: str) -> tuple[int, int] | ImageError:
    """Width and height of an image that can be decoded, all its channels."""
    try:
        files = [manifest.image_root / name for name in _files_of(manifest, image)]
        return decoded_size(image, files, len(manifest.channels))
    except ImageError as error:
        return error


def _image_faults(result: tuple[int, int] | ImageError, rows: list[Instance]) -> list[Fault]:
    if isinstance(result, ImageError):
        kind = "missing-file" if result.got == "no such file" else "unreadable-image"
        got = f"{result.got} ({result.where})"
        fault = Fault(kind, rows[0].file, rows[0].line, result.expected, got, result.remedy)
        return [replace(fault, file=row.file, line=row.line) for row in rows]
    width, height = result
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
