"""Extraction on one device: claim a part, compute it, write it, until none is left."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dragn_cache.backbones import Backbone
from dragn_cache.errors import StoreError
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.engine import Engine, Policy
from dragn_cache.extraction.forward import Forward
from dragn_cache.extraction.plan import (
    PlannedImage,
    choose_precision,
    decide_compute,
    describe,
    open_backbone,
    plan_images,
    require_channels,
)
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.extraction.update import update_plan
from dragn_cache.extraction.workers import Decoder
from dragn_cache.machine import usable_cores
from dragn_cache.manifest import Manifest
from dragn_cache.store import PartPlan, StoreWriter, instances_of, open_writer, plan_parts
from dragn_cache.types import Progress

Say = Callable[[str], None]
"""Called with a line for people about something that takes a while."""

POLL_SECONDS = (0.02, 1.0)  # between looks at parts that other processes work on: first, longest


def extract_on_one_device(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    update: bool,
    progress: Progress | None,
    say: Say,
) -> ExtractReport:
    started = time.perf_counter()
    backbone = open_backbone(config)
    sizes = [len(instances_of(manifest, bag)) for bag in range(len(manifest.bags))]
    compute = decide_compute(out, config, backbone, sum(sizes))
    description = describe(manifest, config, backbone, compute)
    parts = plan_parts(sizes, description.row_bytes, config.part_instances)

    def wanted(part: PartPlan) -> list[PlannedImage]:
        return plan_images(manifest, part, backbone, config.augmentation)

    require_channels(manifest, backbone)
    report = ExtractReport(compute=compute, device=config.device, workers=config.workers)
    report.cores, report.batch_size = usable_cores(), config.batch_size
    if update and (out / "store.json").exists():
        report.update = update_plan(out, description, manifest, wanted, config)
    with (
        open_writer(out, description, parts, manifest) as writer,
        Decoder(
            workers=config.workers,
            ahead_crops=2 * config.batch_size,
            give_way=backbone.mean.device.type == "cpu",
        ) as decoder,
    ):
        report.instances_total, report.parts_total = sum(sizes), len(writer.parts)
        report.bags_total = len(manifest.bags)
        if writer.missing():
            decoder.start()
            run = _Run(writer, sizes, progress)
            forward = _open_forward(backbone, config, compute, say)
            policy = Policy(config.on_error, config.max_errors)
            engine = Engine(wanted, forward, writer, decoder, policy, report, run.advance)
            engine.failed = len(writer.failures()) if config.max_errors is not None else 0
            report.start_seconds = time.perf_counter() - started
            run.until_complete(engine)
        report.failures = writer.finish()
    return report


class _Run:
    """Passes over the missing parts until there are none, with the progress of all processes."""

    def __init__(
        self, writer: StoreWriter, sizes: Sequence[int], progress: Progress | None
    ) -> None:
        self.writer, self.sizes, self.total = writer, sizes, sum(sizes)
        self.progress = progress or (lambda done, total: None)
        self._done = 0

    def until_complete(self, engine: Engine) -> None:
        pause, longest = POLL_SECONDS
        while missing := self.writer.missing():
            todo = sum(self.sizes[bag] for part in missing for bag in part.bags)
            self._done = self.total - todo
            self.progress(self._done, self.total)
            if engine.write(self.writer.claim_missing()):
                pause = POLL_SECONDS[0]
            else:  # others work on what is left: wait until it is there, or they are dead
                time.sleep(pause)
                pause = min(2 * pause, longest)
        self.progress(self.total, self.total)

    def advance(self, count: int) -> None:
        self._done += count
        self.progress(self._done, self.total)


def _open_forward(backbone: Backbone, config: ExtractConfig, compute: str, say: Say) -> Forward:
    forward = Forward(
        backbone,
        compute=compute,
        batch_size=config.batch_size,
        dtype=config.dtype,
        precision=choose_precision(config),
    )
    if compute == "compiled":
        say("compiling the network (half a minute; less the next time)")
    forward.warm_up()
    return forward


def disk_error(out: Path, error: OSError) -> StoreError:
    # HDF5 buries the system's own words in a long line of its own.
    buried = re.search(r"error message = '([^']+)'", str(error))
    return StoreError(
        str(out),
        expected="a folder that can be written",
        got=buried[1] if buried else error.strerror or str(error),
        remedy="free space or correct the rights, then run the same command again; "
        "finished parts are kept",
    )
