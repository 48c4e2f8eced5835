"""``dragn-cache check``: list every fault of a data set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.extraction.config import CheckConfig
from dragn_cache_cli.options import spell_text, takes


@takes(CheckConfig)
def check(
    config: CheckConfig,
    dataset: Annotated[
        str,
        typer.Argument(
            help="A shipped name, a folder with dataset.toml, one CSV, or a folder of bag folders."
        ),
    ],
    images: Annotated[Path | None, typer.Option(help="Image root, if not the manifest's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Join a data set's tables with its images and list every fault with file and line.

    Exit code 0: no fault, though perhaps warnings of what may mislead; 1: faults; 2: the tables
    cannot be read at all.

    Example: dragn-cache check my_dataset/
    """
    from dragn_cache.extraction.check import check_dataset
    from dragn_cache_cli import screen

    with screen.progress_bar("checking", "images") as progress:
        report = check_dataset(dataset, config, images=images, progress=progress)
    manifest = report.manifest
    counts = {
        "dataset": manifest.name,
        "task": manifest.task,
        "bags": len(manifest.bags),
        "instances": manifest.n_instances,
        "images": report.images,
        "labels": list(manifest.labels),
    }
    if as_json:
        faults, doubts = ([asdict(f) for f in fs] for fs in (report.faults, report.doubts))
        screen.print_json({**counts, "faults": faults, "doubts": doubts})
    else:
        for fault in report.faults:
            screen.say(spell_text(str(fault), {}, others=True))
        for doubt in report.doubts:
            screen.say(f"warning: {spell_text(str(doubt), {}, others=True)}")
        screen.say(
            f"{manifest.name}: {counts['bags']} bags, {counts['instances']} instances, "
            f"{report.images} images, {len(manifest.labels)} labels ({manifest.task}): "
            f"{len(report.faults)} faults, {len(report.doubts)} warnings"
        )
    if report.faults:
        raise typer.Exit(1)
