"""``dragn-cache explain``: what each instance counts for, by a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.runs.config import ExplainConfig
from dragn_cache_cli.options import takes
from dragn_cache_cli.own_classes import find_own_classes


@takes(ExplainConfig)
def explain(
    config: ExplainConfig,
    run: Annotated[Path, typer.Argument(help="A run folder of train-agg.")],
    store: Annotated[Path, typer.Option(help="A store with the same features.")],
    out: Annotated[Path, typer.Option(help="Folder for instances.csv and h5_files/.")],
    bags: Annotated[
        str | None, typer.Option(help="Only these: ids separated by commas, or a CSV with bag_id.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON.")
    ] = False,
) -> None:
    """Score every instance: by attention, by its likeness to the bag, or by leaving it out.

    Example: dragn-cache explain runs/hpa-l3 --store hpa.features --split test --out hpa-explained
    """
    from dragn_cache.runs.explain import explain_run
    from dragn_cache.store import open_store
    from dragn_cache_cli import parsing, screen

    if config.allow_class is not None:
        find_own_classes()
    with screen.progress_bar("explaining", "instances") as progress:
        explained = explain_run(
            run,
            open_store(store, warn=screen.warn),
            out,
            config,
            bags=parsing.parse_bags(bags),
            progress=progress,
            warn=screen.warn,
        )
    table = out / "instances.csv"
    if as_json:
        screen.print_json(
            {
                "method": explained.method,
                "bags": len(explained.bags),
                "instances": len(explained.scores),
                "columns": explained.columns,
                "instances_csv": str(table),
                "h5_files": str(out / "h5_files") if config.h5 else None,
            }
        )
        return
    counts = f"{len(explained.scores)} instances of {len(explained.bags)} bags"
    screen.say(f"{explained.method} of {counts}: {table}")
