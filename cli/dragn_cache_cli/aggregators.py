"""``dragn-cache aggregators``: list the methods that can be trained on a store."""

from __future__ import annotations

from typing import Annotated

import typer


def aggregators(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: the tap they need, whether order matters, whether they attend.

    A head is trained together with its aggregator; an svm is fitted to encoded bags.

    Example: dragn-cache aggregators
    """
    from dataclasses import asdict

    from dragn_cache.methods import method_facts, method_names
    from dragn_cache_cli import screen

    found = {name: asdict(method_facts(name)) for name in method_names()}
    if as_json:
        screen.print_json(found)
        return
    rows = [(name, *facts.values()) for name, facts in found.items()]
    screen.print_table(["aggregator", "needs", "order-sensitive", "attention", "classifier"], rows)
