"""``dragn-cache backbones``: list the networks that features can come from."""

from __future__ import annotations

from typing import Annotated

import typer


def backbones(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the backbones and the taps that they store by default.

    Example: dragn-cache backbones
    """
    from dragn_cache.backbones import family, list_backbones
    from dragn_cache_cli import screen

    rows = [(name, *family(name).default_taps) for name in list_backbones()]
    if as_json:
        screen.print_json({name: {"map": last, "vector": gap} for name, last, gap in rows})
    else:
        screen.print_table(["backbone", "map", "vector"], rows)
