"""``dragn-cache evaluate``: scores of a run on its test bags, or on bags that it has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.runs.config import EvaluateConfig
from dragn_cache.scoring.scores import CALIBRATION_SCORES, SCORES
from dragn_cache_cli.options import takes
from dragn_cache_cli.own_classes import find_own_classes


@takes(EvaluateConfig)
def evaluate(
    config: EvaluateConfig,
    run: Annotated[Path, typer.Argument(help="A run folder of train-agg.")],
    out: Annotated[Path, typer.Option(help="Folder for scores, predictions and the diagram.")],
    store: Annotated[
        Path | None, typer.Option(help="Labelled bags to predict. [the run's predictions.csv]")
    ] = None,
    bags_csv: Annotated[
        Path | None, typer.Option("--bags", help="Only these bags of the store, with these labels.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Score a run, with intervals, a table of labels and a reliability diagram.

    With --store every bag must be new to the run; --split scores its own bags instead.

    Example: dragn-cache evaluate runs/hpa-l3 --store new.features --out new-scores
    """
    from dragn_cache.runs.evaluate import LABEL_COLUMNS, evaluate_run, label_rows
    from dragn_cache.store import open_store
    from dragn_cache_cli import screen

    if config.allow_class is not None:
        find_own_classes()
    evaluation = evaluate_run(
        run,
        out,
        config,
        store=None if store is None else open_store(store, warn=screen.warn),
        bags_csv=bags_csv,
        warn=screen.warn,
    )
    scores = evaluation.scores
    if as_json:
        screen.print_json({evaluation.name: scores})
        return
    rows = [
        (s.name, screen.score_text(scores[s.name], scores["intervals"][s.name])) for s in SCORES
    ]
    rows += [(s.name, screen.score_text(scores[s.name])) for s in CALIBRATION_SCORES]
    title = f"{evaluation.name}: {scores['bags']} bags, decided by {scores['decision']}"
    screen.print_table(["score", "with 95 % interval"], rows, title)
    cells = [
        [row[0], row[1], *("–" if cell is None else f"{cell:.3f}" for cell in row[2:])]
        for row in label_rows(evaluation)
    ]
    # Words that a narrow terminal can part.
    head = [name.replace("_", " ") for name in LABEL_COLUMNS]
    screen.print_table(["label", *head, "threshold"], cells)
    screen.say(f"written: {out}")
