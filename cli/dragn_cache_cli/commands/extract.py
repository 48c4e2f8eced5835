"""``dragn-cache extract``: images → features, once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dragn_cache.extraction.config import ExtractConfig
from dragn_cache_cli.options import own_flags, spell_text, takes

if TYPE_CHECKING:
    from dragn_cache.extraction.report import ExtractReport


@takes(ExtractConfig, section="extract")
def extract(
    config: ExtractConfig,
    dataset: Annotated[str, typer.Option(help="A name, a folder, or a CSV; see check.")],
    out: Annotated[Path, typer.Option(help="The store to make or to go on with.")],
    images: Annotated[Path | None, typer.Option(help="Image root, if not the manifest's.")] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Compute what is new or has changed, drop what is gone, keep the rest."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a frozen backbone over every crop of every bag and store its features.

    Killed at any point, the same command goes on; finished, it does nothing. Started several
    times at once, on one machine or on several that see the store, the processes share the work.
    Exit code 0: everything is in the store; 1: done, but inputs were skipped; 2: error.

    A setting is its option's, else that of --config, else that of [extract] in the data set's
    dataset.toml, else the default shown here.

    Example: dragn-cache extract --dataset hpa --backbone resnet50 --size 224x224 --out hpa.features
    """
    from dragn_cache.extraction.extract import extract as run
    from dragn_cache.manifest import read_manifest
    from dragn_cache_cli import screen

    manifest = read_manifest(dataset, images=images)
    with screen.progress_bar("extracting", "images") as progress:
        report = run(
            manifest,
            config,
            out,
            update=update,
            progress=progress,
            say=screen.note,
            warn=screen.warn,
        )
    advice = spell_text(report.advice, own_flags(extract))
    if as_json:
        screen.print_json({**asdict(report), "limit": report.limit, "advice": advice})
    else:
        _print_report(report, advice, out)
    if report.failures:
        screen.warn(
            f"{len(report.failures)} inputs were not used: see {out / 'failures.csv'}; mend them "
            "and repeat the command with --update"
        )
        raise typer.Exit(1)


def _print_report(report: ExtractReport, advice: str, out: Path) -> None:
    from dragn_cache_cli import screen

    if report.update is not None:
        update = report.update
        screen.say(
            f"update: {update.kept} bags kept, {len(update.changed)} changed, "
            f"{len(update.new)} new, {len(update.removed)} removed, "
            f"{len(update.waiting)} still to be written"
        )
    if not report.parts_written:
        screen.say(f"{out}: complete, nothing to compute")
        return
    rate = report.instances_done / max(1e-9, report.total_seconds - report.start_seconds)
    screen.say(
        f"{out}: {report.instances_done} instances of {report.images_decoded} images in "
        f"{report.total_seconds:.1f} s ({rate:.1f}/s after {report.start_seconds:.1f} s of "
        f"starting), {report.compute} on {report.device}, parts {report.parts_written} of "
        f"{report.parts_total}"
    )
    each = 1000 * report.decode_seconds / max(1, report.images_decoded)
    screen.say(
        f"time: network {report.forward_seconds + report.device_seconds:.1f} s, waiting for images "
        f"{report.wait_seconds:.1f} s, for the disk {report.stall_seconds:.1f} s; decoding "
        f"{report.decode_seconds:.1f} s in {report.workers} workers ({each:.1f} ms an image), "
        f"writing {report.write_seconds:.1f} s beside"
    )
    screen.say(f"limit: {report.limit}; {advice}")
