"""``dragn-cache import``: features that another tool has made → a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dragn_cache.interop.config import ImportConfig
from dragn_cache_cli.options import takes

if TYPE_CHECKING:
    from dragn_cache.interop import ImportReport


@takes(ImportConfig)
def import_features(
    config: ImportConfig,
    source: Annotated[Path, typer.Argument(help="A folder or a file with features.")],
    out: Annotated[Path, typer.Option(help="The store to make or to go on with.")],
    bags: Annotated[
        Path | None, typer.Option(help="A table of bags: labels, splits, groups, order.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Make a store of features that another tool has computed.

    Every bag is checked before anything is written. Killed at any point, the same command goes
    on; finished, it does nothing; with a source that has changed it refuses.

    Example: dragn-cache import clam_features/ --bags labels.csv --out mine.features
    """
    from dragn_cache.interop import import_features as run
    from dragn_cache_cli import screen

    with screen.progress_bar("checking and importing", "bags") as progress:
        report = run(
            source,
            out,
            config,
            bags_csv=bags,
            progress=progress,
            say=screen.note,
            warn=screen.warn,
        )
    if as_json:
        screen.print_json({"store": str(out), **_facts(report)})
        return
    _print_report(report, out)


def _facts(report: ImportReport) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def _print_report(report: ImportReport, out: Path) -> None:
    from dragn_cache_cli import screen

    taps = ", ".join(
        f"{tap.name} {'×'.join(map(str, tap.shape))} {tap.dtype}" for tap in report.taps
    )
    state = f"parts {report.parts_written} of {report.parts_total}"
    if report.parts_missing:
        state += f", {report.parts_missing} are being written by another process"
    elif not report.parts_written:
        state = "complete already, nothing to do"
    screen.say(
        f"{out}: {report.bags} bags, {report.instances} instances from {report.layout}, {taps}; "
        f"{state}"
    )
    bags = "" if report.labelled else " --bags LABELS.csv"
    screen.note(f"next: dragn-cache train-agg --store {out} --aggregator mean{bags}")
