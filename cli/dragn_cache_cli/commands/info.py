"""``dragn-cache info``: what a store holds and how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    store: Annotated[Path, typer.Argument(help="A feature store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a store's taps, size, completeness and provenance.

    Example: dragn-cache info hpa.features
    """
    from dragn_cache.store import open_store
    from dragn_cache_cli import screen

    opened = open_store(store, warn=screen.warn)
    facts = opened.summary()
    if as_json:
        screen.print_json(facts)
        return
    rows = [
        (tap.name, "×".join(map(str, tap.shape)), tap.dtype, screen.size_text(tap.row_bytes))
        for tap in opened.description.taps
    ]
    missing = len(facts["missing_parts"])
    state = f"incomplete: {missing} parts missing" if missing else "complete"
    screen.say(
        f"{store}: {facts['format']}, {facts['bags']} bags, {facts['instances']} instances, "
        f"{facts['parts']} parts, {screen.size_text(facts['bytes'])}, {state}, "
        f"{facts['failures']} inputs not used"
    )
    screen.print_table(["tap", "shape", "dtype", "per instance"], rows)
    for kind, digest in facts["digests"].items():
        screen.say(f"{kind}  {digest}")
        _print_values(screen, facts["provenance"][kind])


def _print_values(screen: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        screen.say(f"  {key} = {value}")
