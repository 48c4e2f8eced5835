"""``dragn-cache predict``: a trained run on a store of other bags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.runs.config import ApplyConfig
from dragn_cache.scoring.scores import AUC_MACRO
from dragn_cache_cli.options import takes
from dragn_cache_cli.own_classes import find_own_classes


@takes(ApplyConfig)
def predict(
    config: ApplyConfig,
    run: Annotated[Path, typer.Argument(help="A run folder of train-agg.")],
    store: Annotated[Path, typer.Option(help="A store with the same features.")],
    out: Annotated[Path, typer.Option(help="Folder for predictions.csv and metrics.json.")],
    bags: Annotated[Path | None, typer.Option(help="Only these bags, with these labels.")] = None,
) -> None:
    """Apply a trained run to a store's bags; with labels, score them.

    Example: dragn-cache predict runs/hpa-l3 --store new.features --out new-predictions
    """
    from dragn_cache.runs.predict import predict_run
    from dragn_cache.store import open_store
    from dragn_cache_cli import screen

    if config.allow_class is not None:
        find_own_classes()
    scores = predict_run(
        run, open_store(store, warn=screen.warn), out, config, bags_csv=bags, warn=screen.warn
    )
    screen.say(f"predictions: {out / 'predictions.csv'}")
    if scores is not None:
        name = AUC_MACRO.name
        text = screen.score_text(scores[name], scores["intervals"][name])
        screen.say(f"{name} over {scores['bags']} bags: {text}")
