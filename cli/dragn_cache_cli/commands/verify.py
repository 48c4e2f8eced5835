"""``dragn-cache verify``: compare every bag of a store with its digest."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


def verify(
    store: Annotated[Path, typer.Argument(help="A feature store.")],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Move damaged parts aside and print how to rewrite them."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every bag of a store and compare it with its digest; name the damaged ones.

    Exit code 0: complete and whole; 1: bags are damaged or parts are missing.

    Example: dragn-cache verify hpa.features --repair
    """
    from dragn_cache.store import open_store
    from dragn_cache.store.repair import move_aside
    from dragn_cache_cli import screen
    from dragn_cache_cli.rebuild import rebuild_command

    opened = open_store(store)
    missing = opened.missing_parts()
    present = [number for number in opened.parts if number not in missing]
    damaged: list[tuple[int, str, str]] = []
    with screen.progress_bar("verifying", "parts") as progress:
        for done, number in enumerate(present, start=1):
            damaged += [(number, bag, what) for bag, what in opened.verify_part(number)]
            progress(done, len(present))
    names = {number: opened.part_path(number).name for number in opened.parts}
    faulty = sorted({number for number, _, _ in damaged})
    moved = move_aside(opened, faulty, screen.note) if repair else []
    command = rebuild_command(opened.description, store)
    if as_json:
        rows = [{"bag_id": b, "part": names[n], "fault": w} for n, b, w in damaged]
        record: dict[str, Any] = {"damaged": rows, "missing_parts": missing}
        record |= {"parts": len(opened.parts), "moved": [str(path) for path in moved]}
        screen.print_json({**record, "command": command})
    else:
        for number, bag, what in damaged:
            screen.say(f"damaged: bag {bag!r} in {names[number]}: {what}")
        for number in missing:
            screen.say(f"missing: {names[number]}")
        for path in moved:
            screen.say(f"moved aside: {path}")
        screen.say(
            f"{store}: {len(present)} of {len(opened.parts)} parts, {len(damaged)} damaged bags"
        )
        if damaged and not repair:
            screen.note(f"to rewrite them: dragn-cache verify {shlex.quote(str(store))} --repair")
        elif damaged or missing:
            _print_how_to_rewrite(command)
    if damaged or missing:
        raise typer.Exit(1)


def _print_how_to_rewrite(command: str | None) -> None:
    from dragn_cache_cli import screen

    if command is None:
        screen.note(
            "to rewrite what is missing, repeat what has written this store: it was neither "
            "extracted nor imported by dragn-cache, or does not say how"
        )
    else:
        screen.note("to rewrite what is missing, from the same data set and weights:")
        screen.note(command)
