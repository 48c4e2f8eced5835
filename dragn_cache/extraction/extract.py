"""Stage one: every crop of every bag once through a frozen backbone, into a store.

Work goes part by part, and a part that exists is complete: a killed run resumes by writing the
parts that are missing, and several processes share a store by claiming parts. How features are
computed is decided once, for the whole plan, and is part of the store's *numerics*. The engine that
decodes, computes and writes is in `dragn_cache.extraction.engine`.
"""

from __future__ import annotations

import time
from pathlib import Path

from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.many_devices import extract_on_devices
from dragn_cache.extraction.one_device import extract_on_one_device
from dragn_cache.extraction.plan import require_image_root, require_images, with_channels
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.images.intensity import few_levels
from dragn_cache.manifest import Manifest
from dragn_cache.manifest.doubts import warn_doubts
from dragn_cache.store import open_store
from dragn_cache.store.disk import disk_error, require_writable
from dragn_cache.store.leaks import warn_leaks
from dragn_cache.types import Progress, Say, Warn


def extract(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    *,
    update: bool = False,
    progress: Progress | None = None,
    say: Say = lambda text: None,
    warn: Warn = lambda text: None,
) -> ExtractReport:
    """Run a frozen backbone over all instances of a manifest and store its taps.

    The same call goes on after a kill, shares the work with other processes that make it at the
    same time, and does nothing when the store is complete.

    Args:
        update: bring a store that was made from an earlier state of the manifest and its images
            up to date: bags that are new or have changed are computed, removed ones dropped.
        say: called with lines for people.
        warn: called with one line for each thing that may mislead in what is made of the features.

    Raises:
        InputError, ImageError: an input cannot be used and ``on_error`` is ``stop``.
        StoreMismatchError: there is a store of other settings at ``out``.
        StoreError: the disk is full or cannot be written. What was complete stays.
        DragnCacheError: a decoding process or a device's process died, or a value overflowed.
    """
    started = time.perf_counter()
    config = config.with_defaults(manifest.extract)
    require_writable(out)
    require_image_root(manifest)
    if config.on_error == "stop":
        require_images(manifest)
    config = with_channels(manifest, config)
    warn_doubts(manifest.bags, manifest.task, warn)
    try:
        run = extract_on_devices if len(config.devices) > 1 else extract_on_one_device
        report = run(manifest, config, out, update=update, progress=progress, say=say)
    except OSError as error:
        raise disk_error(out, error) from error
    if report.images_decoded and few_levels(report.levels):
        warn(
            f"all images lie between the grey levels {report.levels[0]} and {report.levels[1]} of "
            "0 to 255: dragn-cache check tells the range of their numbers, for another `intensity`"
        )
    warn_leaks(open_store(out), manifest.bags, warn)
    report.total_seconds = time.perf_counter() - started
    return report
