"""``dragn-cache aggregators``: list the methods that can be trained on a store."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dragn_cache.options import REQUIRED, Declared, value_text


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

    from dragn_cache.training.methods import (
        method_declarations,
        method_facts,
        method_names,
        method_options,
        method_text,
    )
    from dragn_cache_cli import screen

    facts_of = {key: method_facts(key) for key in ([name] if name else method_names())}
    if as_json:
        record = {}
        for key, facts in facts_of.items():
            described = {k: _description(d) for k, d in method_declarations(key).items()}
            record[key] = {**asdict(facts), "options": method_options(key), "described": described}
        screen.print_json(record)
        return
    if name is not None:
        for line in method_text(name).splitlines():
            screen.say(line)
    rows = [
        (key, facts.needs, *map(_yes, (facts.order_sensitive, facts.attention)), facts.classifier)
        for key, facts in facts_of.items()
    ]
    screen.print_table(["aggregator", "tap", "order-sensitive", "attention", "classifier"], rows)
    if name is not None:
        options = [_row(declared) for declared in method_declarations(name).values()]
        screen.print_table(["--option", "value", "default", "help"], options)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _description(declared: Declared) -> dict[str, Any]:
    """The entries of an option in `--json`, besides its default."""
    return {"expected": allowed(declared), "help": declared.help, "sweep": declared.sweep}


def _row(declared: Declared) -> tuple[str, str, str, str]:
    required = declared.default is REQUIRED
    default = "required" if required else value_text(declared.default)
    return declared.name, allowed(declared), default, declared.help


def allowed(declared: Declared) -> str:
    """The allowed values in words; None is written `none` on the command line."""
    return f"{declared.expected}, or none" if declared.optional else declared.expected
