"""``dragn-cache verify``: compare every bag of a store with its digest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    store: Annotated[Path, typer.Argument(help="A feature store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every bag of a store and compare it with its digest; name the damaged ones.

    Exit code 0: complete and whole; 1: bags are damaged or parts are missing.

    Example: dragn-cache verify hpa.features
    """
    from dragn_cache.store import open_store
    from dragn_cache_cli import screen

    opened = open_store(store)
    missing = opened.missing_parts()
    present = [number for number in opened.parts if number not in missing]
    damaged = []
    with screen.progress_bar("verifying", "parts") as progress:
        for done, number in enumerate(present, start=1):
            part = opened.part_path(number).name
            damaged += [(bag, part, what) for bag, what in opened.verify_part(number)]
            progress(done, len(present))
    if as_json:
        rows = [{"bag_id": b, "part": p, "fault": w} for b, p, w in damaged]
        screen.print_json({"damaged": rows, "missing_parts": missing, "parts": len(opened.parts)})
    else:
        for bag, part, what in damaged:
            screen.out.print(
                f"damaged: bag {bag!r} in {part}: {what}", markup=False, soft_wrap=True
            )
        for number in missing:
            screen.out.print(f"missing: {opened.part_path(number).name}", soft_wrap=True)
        screen.out.print(
            f"{store}: {len(present)} of {len(opened.parts)} parts, {len(damaged)} damaged bags",
            markup=False,
            soft_wrap=True,
        )
        if damaged:
            paths = " ".join(str(store / "parts" / part) for part in {p for _, p, _ in damaged})
            screen.note(f"to rewrite: rm -r {paths}, then the same extract command again")
    if damaged or missing:
        raise typer.Exit(1)
