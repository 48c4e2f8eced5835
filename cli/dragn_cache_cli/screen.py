"""Output for people: tables on stdout; progress and notes on stderr.

Names of others are in nearly every line. Here they lose what would steer a terminal or not show
(`shown`), and nothing in them is taken for markup or an emoji's name.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dragn_cache.texts import shown
from dragn_cache_cli.options import shown_flags, spell_text

PIPED_WIDTH = 160  # where stdout is no screen, so that tables need not fold

_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}

_out = Console(**_PLAIN, width=None if sys.stdout.isatty() else PIPED_WIDTH)
_err = Console(**_PLAIN, stderr=True)


def print_json(value: object) -> None:
    """Print one JSON document on stdout; what does not show is escaped as JSON has it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    _out.out("\n".join(re.sub(r"[^ -~]", _escaped, line) for line in text.split("\n")))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    return character if character.isprintable() else json.dumps(character)[1:-1]


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a table on stdout; columns of numbers are aligned to the right."""
    table = Table(
        title=Text(shown(title), "table.title") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for k, name in enumerate(head):
        numeric = all(isinstance(row[k], int | float) for row in rows)
        table.add_column(Text(shown(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(str(cell))) for cell in row))
    _out.print(table)


def say(text: str) -> None:
    """Print a line on stdout."""
    _out.print(shown(text), soft_wrap=True)


def note(text: str) -> None:
    """Print a line on stderr."""
    _err.print(shown(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning on stderr, with settings named by their options."""
    text = spell_text(text, shown_flags.get({}))
    _err.print(f"warning: {shown(text)}", style="yellow", soft_wrap=True)


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the rate and the time left; yields ``update(done, total)``.

    Where stderr is no terminal (a log file, CI) nothing is drawn.
    """
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s"),
        TimeRemainingColumn(compact=True),
        console=_err,
        disable=not _err.is_terminal,
        transient=True,
    ) as bars:
        task = bars.add_task(shown(title), total=None, rate="–")
        start: list[Any] = []  # done and time at the first update

        def update(done: int, total: int) -> None:
            if not start:  # the work of an earlier run does not count for the rate
                start.extend((done, time.monotonic()))
            elapsed = time.monotonic() - start[1]
            rate = f"{(done - start[0]) / elapsed:.1f}" if elapsed > 0.5 else "–"
            bars.update(task, completed=done, total=total, rate=rate)

        yield update


def size_text(count: float) -> str:
    """Bytes for people: 1,234 → 1.2 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def time_text(seconds: float) -> str:
    """A duration for people: 3.4 s, 12 min, 5.2 h."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def score_text(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A score with its 95 % interval, or a dash where it is undefined."""
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")
