"""``dragn-cache train-agg``: an aggregator and a classifier on cached features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def train_agg(
    store: Annotated[Path, typer.Option(help="A feature store.")],
    out: Annotated[
        Path | None, typer.Option(help="Run folder. [runs/STORE-AGGREGATOR-sSEED]")
    ] = None,
    aggregator: Annotated[str | None, typer.Option(help="A name; see aggregators. [dragn]")] = None,
    unit: Annotated[
        str | None, typer.Option(help="DRAGN's unit: L1Agg, L2Agg or L3Agg. [L3Agg]")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="An aggregator's option, name=value; may be repeated."),
    ] = None,
    tap: Annotated[str | None, typer.Option(help="Tap to train on. [map or vector]")] = None,
    bags: Annotated[Path | None, typer.Option(help="Other labels, splits or groups.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training bags.")] = 60,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 3e-4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 1e-2,
    dropout: Annotated[float, typer.Option(help="Dropout before the head.")] = 0.5,
    pos_weight: Annotated[
        str | None, typer.Option(help="Weight of positive targets: a number, or balanced.")
    ] = None,
    scale: Annotated[
        Literal["none", "standard"], typer.Option(help="Standardise features by training bags.")
    ] = "none",
    batch_size: Annotated[int, typer.Option(help="Bags of a step.")] = 16,
    order: Annotated[
        Literal["random", "manifest"], typer.Option(help="Order of instances in training.")
    ] = "random",
    views: Annotated[
        Literal["off", "random", "all"],
        typer.Option(help="The store's augmented views in training."),
    ] = "off",
    seed: Annotated[int, typer.Option(help="Of split, initialisation, order and views.")] = 0,
    shuffle_seed: Annotated[
        int | None, typer.Option(help="Of order and views alone. [the seed]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    memory: Annotated[
        str, typer.Option(help="What features may fill, as 8GB; larger ones are streamed.")
    ] = "auto",
    intervals: Annotated[int, typer.Option(help="Resamples for the intervals; 0: none.")] = 1000,
    decision: Annotated[
        str, typer.Option(help="What counts as yes: default, half, thresholds or top-K.")
    ] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Train an aggregator on a store; validation chooses the epoch, test reports.

    Splits are the manifest's, else 50/40/10 test/train/validation by group, seeded.

    Example: dragn-cache train-agg --store hpa.features --unit L3Agg --out runs/hpa-l3
    """
    from dragn_cache.config import TrainConfig
    from dragn_cache.runs import run_name, train_run
    from dragn_cache.store import open_store
    from dragn_cache_cli import parsing, screen

    options = parsing.parse_options(option or [])
    if unit is not None:
        options["unit"] = unit
    config = TrainConfig(
        aggregator=aggregator or "dragn",
        options=options,
        tap=tap,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        dropout=dropout,
        pos_weight=parsing.parse_weight(pos_weight),
        scale=scale,
        order=order,
        views=views,
        seed=seed,
        shuffle_seed=shuffle_seed,
        device=device,
        memory=memory,
        intervals=intervals,
        decision=decision,
    )
    run = out or Path("runs") / run_name(store, config)
    with screen.progress_bar("training", "epochs") as progress:
        metrics = train_run(
            open_store(store),
            config,
            run,
            bags_csv=bags,
            progress=lambda row: progress(int(row["epoch"]), epochs),
            warn=screen.warn,
        )
    if as_json:
        screen.print_json(metrics)
        return
    names = ["auc_macro", "map", "f1_macro"]
    rows = [
        (
            split,
            scores["bags"],
            *(screen.score_text(scores[n], scores["intervals"][n]) for n in names),
        )
        for split, scores in metrics.items()
    ]
    screen.print_table(["split", "bags", *names], rows, "scores with 95 % intervals")
    screen.out.print(f"run: {run}", markup=False, soft_wrap=True)
