"""Extraction on one device: claim a part, compute it, write it, until none is left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.engine import Engine
from dragn_cache.extraction.forward import Forward
from dragn_cache.extraction.plan import ExtractionPlan, plan_extraction
from dragn_cache.extraction.report import ExtractReport
from dragn_cache.extraction.update import update_store
from dragn_cache.extraction.workers import Decoder
from dragn_cache.machine import usable_cores
from dragn_cache.manifest import Manifest
from dragn_cache.store import StoreWriter, open_writer
from dragn_cache.store.claims import SILENT_SECONDS
from dragn_cache.types import Progress, Say

POLL_SECONDS = (0.02, 1.0)  # between looks at parts that other processes work on: first, longest


def extract_on_one_device(
    manifest: Manifest,
    config: ExtractConfig,
    out: Path,
    *,
    update: bool,
    progress: Progress | None,
    say: Say,
) -> ExtractReport:
    """Write the parts that are missing, beside other processes if they work on the store too."""
    started = time.perf_counter()
    plan = plan_extraction(manifest, config, out)
    report = ExtractReport(
        instances_total=plan.instances,
        bags_total=len(manifest.bags),
        compute=plan.compute,
        device=config.device,
        workers=config.workers,
        cores=usable_cores(),
        batch_size=config.batch_size,
    )
    if update and (out / "store.json").exists():
        report.update = update_store(out, plan, say)
    with (
        open_writer(out, plan.description, plan.parts, manifest, say) as writer,
        _open_decoder(plan) as decoder,
    ):
        report.parts_total = len(writer.parts)
        if writer.missing():
            decoder.start()  # the workers begin while the network is made ready
            run = _Run(writer, plan.bag_sizes, progress, say)
            engine = Engine(plan, _open_forward(plan, say), writer, decoder, report, run.advance)
            report.start_seconds = time.perf_counter() - started
            run.until_complete(engine)
        report.failures = writer.finish()
    return report


def _open_decoder(plan: ExtractionPlan) -> Decoder:
    return Decoder(
        workers=plan.config.workers,
        ahead_crops=2 * plan.config.batch_size,
        give_way=plan.backbone.mean.device.type == "cpu",
    )


def _open_forward(plan: ExtractionPlan, say: Say) -> Forward:
    forward = plan.create_forward()
    if plan.compute == "compiled":
        say("compiling the network (half a minute; less the next time)")
    forward.warm_up()
    return forward


class _Run:
    """Passes over the missing parts until there are none; counts what other processes write too."""

    def __init__(
        self, writer: StoreWriter, bag_sizes: Sequence[int], progress: Progress | None, say: Say
    ) -> None:
        self.writer, self.bag_sizes, self.total = writer, bag_sizes, sum(bag_sizes)
        self.say = say
        self.progress = progress or (lambda done, total: None)
        self._done = 0

    def until_complete(self, engine: Engine) -> None:
        pause, longest = POLL_SECONDS
        waiting_since: float | None = None
        while missing := self.writer.missing():
            instances_missing = sum(self.bag_sizes[bag] for part in missing for bag in part.bags)
            self._done = self.total - instances_missing
            self.progress(self._done, self.total)
            if engine.write(self.writer.claim_missing()):
                pause, waiting_since = POLL_SECONDS[0], None
            else:  # others work on what is left: wait until it is there, or they are dead
                now = time.monotonic()
                waiting_since = now if waiting_since is None else waiting_since
                if now - waiting_since > SILENT_SECONDS:
                    for line in self.writer.others():
                        self.say(f"waiting for {line}")
                    waiting_since = math.inf  # said once
                time.sleep(pause)
                pause = min(2 * pause, longest)
        self.progress(self.total, self.total)

    def advance(self, count: int) -> None:
        self._done += count
        self.progress(self._done, self.total)
