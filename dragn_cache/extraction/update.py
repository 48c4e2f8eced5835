"""Stage one's side of an update: the bags whose images are no longer what the store was made from.

Every image file of a kept bag is read and compared by its sha256: a file's date tells nothing after
a copy. An input that could not be used is tried again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dragn_cache.errors import ImageError
from dragn_cache.extraction.plan import ExtractionPlan, PlannedImage
from dragn_cache.extraction.workers import Decoded, attempt
from dragn_cache.files import file_sha256
from dragn_cache.store import PartPlan
from dragn_cache.store.plan import bag_plan
from dragn_cache.store.update import StoredBag, UpdateReport, replan, stored_bags
from dragn_cache.types import Say


def update_store(out: Path, plan: ExtractionPlan, say: Say) -> UpdateReport:
    """Change a store's plan to the manifest's and its images' present state."""
    stored = stored_bags(out, plan.description)
    chosen = [k for k, bag in enumerate(plan.manifest.bags) if bag.bag_id in stored]
    with ThreadPoolExecutor(max(1, plan.config.workers)) as pool:
        flags = pool.map(
            lambda k: _is_current(plan, k, stored[plan.manifest.bags[k].bag_id][1]), chosen
        )
        current = {k for k, flag in zip(chosen, flags, strict=True) if flag}
    return replan(
        out,
        plan.description,
        plan.manifest,
        lambda bag, _: bag in current,
        plan.config.part_instances,
        say,
    )


def _is_current(plan: ExtractionPlan, bag: int, stored: StoredBag) -> bool:
    """Whether a bag's images, and its inputs that fail, are those of the stored bag."""
    if stored.plan != bag_plan(plan.manifest, bag):
        return False
    used = stored.digests
    failed: list[str] = []
    for image in plan.images_of(PartPlan(0, (bag,))):
        orders = [instance.order for _, instance in image.instances]
        if any(order not in used for order in orders):
            result = attempt(image.request)
            failed += _reasons(image, result)
            digest = None if isinstance(result, ImageError) else result.digest
        else:
            digest = digest_files(image.request.files)
        if any(used[order] != digest for order in orders if order in used):
            return False
    return len(failed) == plan.bag_sizes[bag] - len(used)


def _reasons(image: PlannedImage, result: Decoded) -> list[str]:
    """One text for each instance of an image that cannot be used."""
    if isinstance(result, ImageError):
        return [str(result)] * len(image.instances)
    return [box for box in result.boxes if isinstance(box, str)]


def digest_files(files: Sequence[Path]) -> bytes | None:
    """sha256 of a file's bytes, or of several files' digests in order; None if one is missing."""
    digests = []
    for path in files:
        try:
            digests.append(file_sha256(path))
        except OSError:
            return None
    return digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()
