"""``dragn-cache crossval``: several methods on the same folds, compared."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dragn_cache.layers import merge
from dragn_cache.scoring.scores import COMPARED_SCORES
from dragn_cache.studies.config import CrossvalConfig, DivisionConfig
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.recipes import settings_of
from dragn_cache_cli.options import takes

if TYPE_CHECKING:
    from dragn_cache.studies.crossval import CrossvalResult

SHOWN = tuple(score.name for score in COMPARED_SCORES)
# Each method has its own aggregator and options, each training its own seed.
NOT_SHARED = ("aggregator", "options", "seed", "shuffle_seed", "views")


@takes(TrainConfig, leave_out=NOT_SHARED, section="train", recipes=settings_of)
@takes(DivisionConfig, as_="division")
def crossval(
    config: TrainConfig,
    division: DivisionConfig,
    store: Annotated[Path, typer.Option(help="A feature store.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    aggregators: Annotated[
        list[str],
        typer.Option(
            "--aggregator",
            help="Names, separated by commas, with options as in dragn[unit=L3Agg]; "
            "may be repeated.",
        ),
    ],
    bags: Annotated[Path | None, typer.Option(help="Other labels or groups.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Train methods on every fold of several divisions, and compare them.

    Groups are whole in every fold; validation chooses the epoch, test reports. The same command
    goes on after an interruption; methods and seeds may be added.

    Settings of the trainings that are not given come from the file of --config, else from the
    recipe, else from the defaults. The file has settings by name, or in a section [train], as a
    run's config.toml; a cross-validation's own, with sections for each method, is none.

    Example: dragn-cache crossval --store hpa.features --aggregator abmil,dragn[unit=L3Agg] --out cv
    """
    from dragn_cache.store import open_store
    from dragn_cache.studies.crossval import crossval
    from dragn_cache_cli import parsing, screen

    methods = []
    for name, options in parsing.parse_aggregators(aggregators):
        # Options of a recipe or a file are for the method that it names.
        own = merge(TrainConfig, config.to_dict(), {"aggregator": name, "options": options})
        methods.append((name, own["options"]))
    study = CrossvalConfig(**division.to_dict(), train=config, aggregators=tuple(methods))
    with screen.progress_bar("cross-validating", "trainings") as progress:
        result = crossval(
            open_store(store, warn=screen.warn),
            study,
            out,
            bags_csv=bags,
            progress=progress,
            warn=screen.warn,
        )
    if as_json:
        tables = {"summary": result.summary, "comparison": result.comparison}
        failed = [
            {
                k: v
                for k, v in asdict(training).items()
                if k in ("aggregator", "seed", "fold", "error")
            }
            for training in result.failed
        ]
        screen.print_json({**tables, "failed": failed})
    else:
        _show(result, out)
    for training in result.failed:
        label, seed, fold = training.task
        screen.warn(f"{label}, seed {seed}, fold {fold} failed: {training.error}")
    if result.failed:
        raise typer.Exit(1)


def _show(result: CrossvalResult, out: Path) -> None:
    from dragn_cache_cli import screen

    rows = []
    for row in result.summary:
        scores = []
        for name in SHOWN:
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            interval = None if low is None else (low, high)
            scores.append(screen.score_text(row[f"{name}_mean"], interval))
        seconds = row["seconds_mean"]
        time = "–" if seconds is None else screen.time_text(seconds)
        rows.append((row["aggregator"], *scores, time))
    each = result.summary[0]["trainings"] + result.summary[0]["failed"]
    title = f"test bags of {each} trainings a method, 95 % intervals"
    screen.print_table(["aggregator", *SHOWN, "each in"], rows, title)
    screen.say(f"tables and picture: {out}")
