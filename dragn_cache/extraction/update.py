"""Stage one's side of an update: which bags' images are no longer what the store was made from.

Every image file of a kept bag is read and compared by its sha256: a file's date tells nothing after
a copy. An input that could not be used is tried again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dragn_cache.errors import ImageError
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.plan import PlannedImage
from dragn_cache.extraction.workers import attempt
from dragn_cache.manifest import Manifest
from dragn_cache.store import PartPlan, StoreDescription, instances_of
from dragn_cache.store.plan import bag_plan
from dragn_cache.store.update import StoredBag, UpdateReport, replan, stored_bags


def update_plan(
    out: Path,
    description: StoreDescription,
    manifest: Manifest,
    wanted: Callable[[PartPlan], Sequence[PlannedImage]],
    config: ExtractConfig,
) -> UpdateReport:
    """Change a store's plan to the manifest's and its images' present state.

    Args:
        wanted: the images of a part, with the rows that they feed.
    """

    def is_current(bag: int, stored: StoredBag) -> bool:
        return bag in current

    stored = stored_bags(out, description)
    chosen = [k for k, bag in enumerate(manifest.bags) if bag.bag_id in stored]
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        same = pool.map(
            lambda k: _is_current(manifest, k, stored[manifest.bags[k].bag_id][1], wanted), chosen
        )
        current = {k for k, still in zip(chosen, same, strict=True) if still}
    return replan(out, description, manifest, is_current, config.part_instances)


def _is_current(
    manifest: Manifest,
    bag: int,
    stored: StoredBag,
    wanted: Callable[[PartPlan], Sequence[PlannedImage]],
) -> bool:
    if stored.plan != bag_plan(manifest, bag):
        return False
    used = stored.digests
    failed: list[str] = []
    for image in wanted(PartPlan(0, (bag,))):
        orders = [instance.order for _, instance in image.instances]
        if any(order not in used for order in orders):
            result = attempt(image.request)
            failed += _reasons(image, result)
            digest = None if isinstance(result, ImageError) else result.digest
        else:
            digest = digest_files(image.request.files)
        if any(used[order] != digest for order in orders if order in used):
            return False
    return len(failed) == len(instances_of(manifest, bag)) - len(used)


def _reasons(image: PlannedImage, result: object) -> list[str]:
    """One text for each instance of an image that cannot be used."""
    if isinstance(result, ImageError):
        return [str(result)] * len(image.instances)
    boxes = getattr(result, "boxes", ())
    return [box for box in boxes if isinstance(box, str)]


def digest_files(files: Sequence[Path]) -> bytes | None:
    """sha256 of a file's bytes, or of several files' digests in order; None if one is missing."""
    digests = []
    for path in files:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            return None
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()
