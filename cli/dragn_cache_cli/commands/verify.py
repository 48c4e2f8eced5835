"""``dragn-cache verify``: compare a store, a run or a cross-validation with its digests."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer


def verify(
    path: Annotated[
        Path, typer.Argument(help="A feature store, a run's folder or a cross-validation's.")
    ],
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Move damaged parts aside and print how to rewrite them."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a store's bags, or a run's files, with their digests; name the damaged ones.

    Exit code 0: complete and whole; 1: something is damaged or missing.

    Example: dragn-cache verify hpa.features --repair
    """
    from dragn_cache.runs.verify import is_run, verify_files
    from dragn_cache.studies.folder import is_study, verify_study

    if is_study(path):
        _print_files(path, verify_study(path), as_json)
    elif is_run(path):
        _print_files(path, verify_files(path), as_json)
    else:
        _verify_store(path, repair, as_json)


def _print_files(path: Path, faults: list[str], as_json: bool) -> None:
    from dragn_cache_cli import screen

    if as_json:
        screen.print_json({"faults": faults})
    else:
        for fault in faults:
            screen.say(f"damaged: {fault}")
        screen.say(f"{path}: {len(faults)} damaged files")
    if faults:
        raise typer.Exit(1)


def _verify_store(path: Path, repair: bool, as_json: bool) -> None:
    from dragn_cache.store import open_store
    from dragn_cache.store.verify import move_aside, verify_store
    from dragn_cache_cli import screen
    from dragn_cache_cli.rebuild import rebuild_command

    store = open_store(path)
    with screen.progress_bar("verifying", "parts") as progress:
        faults = verify_store(store, progress)
    names = {number: store.part_path(number).name for number in store.parts}
    rows = [(part, bag, fault) for part in faults.parts for bag, fault in part.bags]
    moved = move_aside(store, faults.damaged, screen.note) if repair else []
    command = rebuild_command(store.description, path)
    if as_json:
        record: dict[str, Any] = {
            "damaged": [_record(names[p.number], b, f) for p, b, f in rows if p.was_read],
            "not_read": [_record(names[p.number], b, f) for p, b, f in rows if not p.was_read],
            "tables": faults.tables,
            "unchecked": faults.unchecked,
            "missing_parts": faults.missing,
            "parts": len(store.parts),
            "moved": [str(path) for path in moved],
            "command": command,
        }
        screen.print_json(record)
    else:
        for part, bag, fault in rows:
            word = "damaged" if part.was_read else "not read"
            screen.say(f"{word}: bag {bag!r} in {names[part.number]}: {fault}")
        for number in faults.missing:
            screen.say(f"missing: {names[number]}")
        for fault in faults.tables:
            screen.say(f"damaged: {fault}")
        for aside in moved:
            screen.say(f"moved aside: {aside}")
        present = len(store.parts) - len(faults.missing)
        screen.say(f"{path}: {present} of {len(store.parts)} parts, {len(rows)} damaged bags")
        if faults.unchecked:
            screen.note(faults.unchecked)
        if faults.damaged and not repair:
            screen.note(f"to rewrite them: dragn-cache verify {shlex.quote(str(path))} --repair")
        elif faults.damaged or faults.missing:
            _print_how_to_rewrite(command)
    if not faults.is_whole:
        raise typer.Exit(1)


def _record(part: str, bag_id: str, fault: str) -> dict[str, str]:
    return {"bag_id": bag_id, "part": part, "fault": fault}


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
