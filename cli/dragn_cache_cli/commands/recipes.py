"""``dragn-cache recipes``: the settings of published trainings, and where each is from."""

from __future__ import annotations

from typing import Annotated

import typer


def recipes(
    name: Annotated[str | None, typer.Argument(help="Only this recipe, value by value.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes for train-agg and crossval --recipe: published settings and their sources.

    Example: dragn-cache recipes dragn-fly
    """
    from dataclasses import asdict

    from dragn_cache.options import value_text
    from dragn_cache.training.recipes import RECIPES, settings_of
    from dragn_cache_cli import screen

    if name is not None:
        settings_of(name)  # refuses names that are none
    chosen = {key: RECIPES[key] for key in ([name] if name else RECIPES)}
    if as_json:
        screen.print_json(
            {key: {k: asdict(s) for k, s in settings.items()} for key, settings in chosen.items()}
        )
        return
    if name is None:
        rows = [
            (key, r["aggregator"].value, len(r), r["aggregator"].source)
            for key, r in chosen.items()
        ]
        screen.print_table(["recipe", "aggregator", "settings", "source"], rows)
        return
    settings = [(k, value_text(s.value), s.source) for k, s in chosen[name].items()]
    screen.print_table(["setting", "value", "source"], settings)
