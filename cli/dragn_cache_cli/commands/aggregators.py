"""``dragn-cache aggregators``: list the methods that can be trained on a store."""

from __future__ import annotations

from typing import Annotated

import typer


def aggregators(
    name: Annotated[
        str | None, typer.Argument(help="Only this method: what it computes, and its options.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods: the tap they are meant for, whether order matters, whether they attend.

    A head is trained together with its aggregator; an svm is fitted to encoded bags.

    Example: dragn-cache aggregators dragn
    """
    from dataclasses import asdict

    from dragn_cache.training.methods import method_facts, method_names, method_options, method_text
    from dragn_cache_cli import parsing, screen

    found = {key: method_facts(key) for key in ([name] if name else method_names())}
    if as_json:
        screen.print_json(
            {key: {**asdict(facts), "options": method_options(key)} for key, facts in found.items()}
        )
        return
    if name is not None:
        screen.say(method_text(name))
    rows = [
        (key, facts.needs, *map(_yes, (facts.order_sensitive, facts.attention)), facts.classifier)
        for key, facts in found.items()
    ]
    screen.print_table(["aggregator", "tap", "order-sensitive", "attention", "classifier"], rows)
    if name is not None:
        options = [(k, parsing.option_text(v)) for k, v in method_options(name).items()]
        screen.print_table(["--option", "default"], options)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
