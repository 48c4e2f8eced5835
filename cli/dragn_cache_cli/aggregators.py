"""``dragn-cache aggregators``: list the methods that can be trained on a store."""

from __future__ import annotations

from typing import Annotated

import typer


def aggregators(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the aggregators: the tap they need, whether order matters, whether they attend.

    Example: dragn-cache aggregators
    """
    from dragn_cache.aggregators import AGGREGATORS
    from dragn_cache_cli import screen

    found = {
        name: {
            "needs": cls.needs,
            "order_sensitive": cls.order_sensitive,
            "attention": cls.has_attention,
        }
        for name, cls in AGGREGATORS.items()
    }
    if as_json:
        screen.print_json(found)
        return
    rows = [(name, *facts.values()) for name, facts in found.items()]
    screen.print_table(["aggregator", "needs", "order-sensitive", "attention"], rows)
