"""Extraction on several devices: one process each, over the same store.

A device's process tells its parent how it goes by messages: `Advanced` and `Said`, any number of
them, then `Finished` or `Stopped`. One that says neither has died.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import cast

from dragn_cache.devices import find_device
from dragn_cache.errors import DragnCacheError, OutOfMemoryError, is_out_of_memory
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.one_device import extract_on_one_device
from dragn_cache.extraction.plan import plan_extraction
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.extraction.update import update_store
from dragn_cache.manifest import Manifest
from dragn_cache.parallel.local import follow_parent, silence_libraries
from dragn_cache.store.disk import disk_error
from dragn_cache.types import Progress, Say


@dataclass(frozen=True)
class Advanced:
    """Instances in the store, as a process sees it, and their total."""

    done: int
    total: int


@dataclass(frozen=True)
class Said:
    """A line for people."""

    line: str


@dataclass(frozen=True)
class Finished:
    """The store is complete, and this is what the process did for it."""

    report: ExtractReport


@dataclass(frozen=True)
class Stopped:
    """The process cannot go on."""

    error: DragnCacheError


Message = Advanced | Said | Finished | Stopped


def extract_on_devices(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    *,
    update: bool,
    progress: Progress | None,
    say: Say,
) -> ExtractReport:
    """Share the missing parts of a store among processes, one for each device."""
    for device in config.devices:
        find_device(device)
    changes = None
    if update and (out / "store.json").exists():  # the plan is changed once, by this process
        first = config.replace(device=config.devices[0])
        plan = plan_extraction(manifest, first, out, backbone_device="cpu")
        changes = update_store(out, plan, say)
    children = _start_processes(manifest, config, out)
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


def _start_processes(
    manifest: Manifest, config: ExtractConfig, out: Path
) -> dict[Connection, SpawnProcess]:
    """One process for each device, by the connection on which it sends its messages."""
    context = multiprocessing.get_context("spawn")
    workers = max(1, config.workers // len(config.devices)) if config.workers else 0
    children = {}
    for device in config.devices:
        receiver, sender = context.Pipe(duplex=False)
        own_config = config.replace(device=device, workers=workers)
        child = context.Process(target=_on_device, args=(manifest, own_config, out, sender))
        child.start()
        sender.close()
        children[receiver] = child
    return children


def _on_device(manifest: Manifest, config: ExtractConfig, out: Path, parent: Connection) -> None:
    """Extract in a process of its own."""
    follow_parent()
    silence_libraries()

    def send(message: Message) -> None:
        parent.send(message)

    try:
        report = extract_on_one_device(
            manifest,
            config,
            out,
            update=False,
            progress=lambda done, total: send(Advanced(done, total)),
            say=lambda line: send(Said(line)),
        )
        send(Finished(report))
    except DragnCacheError as error:
        send(Stopped(error))
    except OSError as error:
        short = is_out_of_memory(error)
        send(Stopped(OutOfMemoryError(error) if short else disk_error(out, error)))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        send(Stopped(OutOfMemoryError(error)))
    except KeyboardInterrupt:
        os._exit(130)


def _follow(
    children: Collection[Connection], progress: Progress | None, say: Say
) -> list[ExtractReport]:
    """Relay what the processes send until all have ended.

    One that dies leaves its parts to the others; only when none is left is it an error.
    """
    reports: list[ExtractReport] = []
    open_connections = list(children)
    advances: dict[Connection, tuple[Advanced, Advanced]] = {}  # the first and the latest
    lines: set[str] = set()
    while open_connections:
        for connection in cast("list[Connection]", wait_for(open_connections)):
            try:
                message: Message = connection.recv()
            except EOFError:
                open_connections.remove(connection)
                continue
            match message:
                case Advanced():
                    first, _ = advances.get(connection, (message, message))
                    advances[connection] = first, message
                    if progress is not None:
                        progress(joint_progress(advances.values()), message.total)
                case Said(line):
                    if line not in lines:  # each process says it
                        lines.add(line)
                        say(line)
                case Finished(report):
                    reports.append(report)
                case Stopped(error):
                    raise error
    if not reports:
        raise DragnCacheError(
            "extraction",
            expected="a process for each device that lives",
            got="none that lived to the end (out of memory?)",
            remedy="run the same command again, with a smaller `batch_size` if it repeats",
        )
    return reports


def joint_progress(advances: Collection[tuple[Advanced, Advanced]]) -> int:
    """Instances done by several processes together.

    Each process counts on from what the store held when it looked: the smallest first count was
    there before all of them, and each adds what it has done since its own first.

    Args:
        advances: of each process that has counted so far, its first message and its latest.
    """
    before = min(first.done for first, _ in advances)
    since = sum(latest.done - first.done for first, latest in advances)
    total = min(latest.total for _, latest in advances)
    return min(before + since, total)
