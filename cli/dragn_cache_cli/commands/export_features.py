"""``dragn-cache export``: a store → the files of another tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.interop.config import TargetLayout


def export_features(
    store: Annotated[Path, typer.Argument(help="A feature store.")],
    layout: Annotated[TargetLayout, typer.Option(help="Whose files to write.")],
    out: Annotated[Path, typer.Option(help="The folder or file to write; nothing may be there.")],
    tap: Annotated[
        str | None, typer.Option(help="Tap, where one array per bag is held. [first vector]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Write a store's features as another tool reads them.

    The files appear when all of them are whole. docs/interop.md says what each layout cannot hold.

    Example: dragn-cache export hpa.features --layout clam --out hpa-clam
    """
    from dataclasses import asdict

    from dragn_cache.interop import export_features as run
    from dragn_cache.store import open_store
    from dragn_cache_cli import screen

    with screen.progress_bar("exporting", "bags") as progress:
        report = run(open_store(store, warn=screen.warn), out, layout, tap=tap, progress=progress)
    if as_json:
        screen.print_json({"out": str(out), **asdict(report)})
        return
    taps = f"{_counted('tap', report.taps)}, {_counted('view', report.views)}"
    screen.say(f"{out}: {report.bags} bags as {layout}, {taps}")
    screen.note(f"to read it back: dragn-cache import {out} --out AGAIN.features")


def _counted(word: str, names: Sequence[str]) -> str:
    return f"{word}{'s' if len(names) > 1 else ''} {', '.join(names)}"
