"""Extraction on several devices: one process each, over the same store."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from dragn_cache.devices import find_device
from dragn_cache.errors import DragnCacheError
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.one_device import Say, disk_error, extract_on_one_device
from dragn_cache.extraction.plan import decide_compute, describe, open_backbone, plan_images
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.extraction.update import update_plan
from dragn_cache.manifest import Manifest
from dragn_cache.parallel.local import follow_parent
from dragn_cache.store import instances_of
from dragn_cache.types import Progress


def extract_on_devices(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    update: bool,
    progress: Progress | None,
    say: Say,
) -> ExtractReport:
    """One process for each device, all on one store."""
    for device in config.devices:
        find_device(device)
    if update and (out / "store.json").exists():  # the plan is changed once, by this process
        backbone = open_backbone(config.replace(device="cpu"))
        first = config.replace(device=config.devices[0])
        sizes = [len(instances_of(manifest, bag)) for bag in range(len(manifest.bags))]
        compute = decide_compute(out, first, backbone, sum(sizes))
        description = describe(manifest, first, backbone, compute)
        changes = update_plan(
            out,
            description,
            manifest,
            lambda part: plan_images(manifest, part, backbone, config.augmentation),
            config,
        )
    else:
        changes = None
    context = multiprocessing.get_context("spawn")
    each = max(1, config.workers // len(config.devices)) if config.workers else 0
    children = {}
    for device in config.devices:
        ours, theirs = context.Pipe(duplex=False)
        own = config.replace(device=device, workers=each)
        child = context.Process(target=_on_device, args=(manifest, own, out, theirs))
        child.start()
        theirs.close()
        children[ours] = child
    try:
        reports = _follow(children, progress, say)
    finally:
        for child in children.values():
            child.terminate()
            child.join()
    report = reports[0]
    for other in reports[1:]:
        report.add(other)
    report.device, report.workers, report.update = config.device, config.workers, changes
    report.failures = max((r.failures for r in reports), key=len)
    return report


def _on_device(manifest: Manifest, config: ExtractConfig, out: Path, parent: Connection) -> None:
    """One device's process: sends instances done, lines for people, and its report or its error."""
    follow_parent()

    def count(done: int, total: int) -> None:
        parent.send((done, total))

    try:
        parent.send(extract_on_one_device(manifest, config, out, False, count, parent.send))
    except DragnCacheError as error:
        parent.send(error)
    except OSError as error:
        parent.send(disk_error(out, error))
    except KeyboardInterrupt:
        os._exit(130)


def _follow(children: dict[Any, Any], progress: Progress | None, say: Say) -> list[ExtractReport]:
    """Relay what the children send until all have ended.

    A child that dies leaves its parts to the others; only when none is left is it an error.
    """
    reports: list[ExtractReport] = []
    open_ends: list[Any] = list(children)
    firsts: dict[Any, int] = {}
    latest: dict[Any, int] = {}
    said: set[str] = set()
    while open_ends:
        for end in list[Any](wait_for(open_ends)):
            try:
                message = end.recv()
            except EOFError:
                open_ends.remove(end)
                continue
            if isinstance(message, DragnCacheError):
                raise message
            if isinstance(message, ExtractReport):
                reports.append(message)
            elif isinstance(message, str) and message not in said:
                said.add(message)
                say(message)
            elif isinstance(message, tuple):
                firsts.setdefault(end, message[0])
                latest[end] = message[0]
                if progress is not None:
                    grown = sum(latest[e] - firsts[e] for e in latest)
                    progress(min(min(firsts.values()) + grown, message[1]), message[1])
    if not reports:
        raise DragnCacheError(
            "extraction",
            expected="a process for each device that lives",
            got="none that lived to the end (out of memory?)",
            remedy="run the same command again, with a smaller `batch_size` if it repeats",
        )
    return reports
