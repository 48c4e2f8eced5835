"""``dragn-cache train-agg``: an aggregator and a classifier on cached features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.aggregators.declared import DragnOptions
from dragn_cache.options import declarations
from dragn_cache.scoring.scores import MAIN_SCORES
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.recipes import settings_of
from dragn_cache_cli.options import takes

UNIT = declarations(DragnOptions)["unit"]


@takes(TrainConfig, section="train", recipes=settings_of)
def train_agg(
    config: TrainConfig,
    store: Annotated[Path, typer.Option(help="A feature store.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. [runs/STORE-AGGREGATOR-sSEED]")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help=f"DRAGN's unit: {UNIT.expected}. [{UNIT.default_text}]")
    ] = None,
    bags: Annotated[Path | None, typer.Option(help="Other labels, splits or groups.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Train an aggregator on a store; validation chooses the epoch, test reports.

    Splits are the manifest's, else 50/40/10 test/train/validation by group, seeded.

    Options that are not given come from the file of --config, else from the recipe, else from the
    defaults. The file has settings by name, or in a section [train], as a run's config.toml.

    Example: dragn-cache train-agg --store hpa.features --unit L3Agg --out runs/hpa-l3
    """
    from dragn_cache.runs.folder import run_name
    from dragn_cache.runs.train import train_run
    from dragn_cache.store import open_store
    from dragn_cache_cli import screen

    if unit is not None:
        config = config.replace(options={**config.options, "unit": unit})
    run = out or Path("runs") / run_name(store, config)
    with screen.progress_bar("training", "epochs") as progress:
        metrics = train_run(
            open_store(store, warn=screen.warn),
            config,
            run,
            bags_csv=bags,
            progress=lambda row: progress(int(row["epoch"]), config.epochs),
            warn=screen.warn,
        )
    if as_json:
        screen.print_json(metrics)
        return
    names = [score.name for score in MAIN_SCORES]
    rows = [
        (
            split,
            scores["bags"],
            *(screen.score_text(scores[n], scores["intervals"][n]) for n in names),
        )
        for split, scores in metrics.items()
    ]
    screen.print_table(["split", "bags", *names], rows, "scores with 95 % intervals")
    screen.say(f"run: {run}")
