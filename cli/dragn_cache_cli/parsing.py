"""Texts of the command line → values of the library."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dragn_cache.errors import InputError


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """Names separated by commas."""
    if text is None:
        return None
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_bags(text: str | None) -> tuple[str, ...] | Path | None:
    """Ids separated by commas, or the path of a table if the text is a file or ends like one."""
    if text is None:
        return None
    path = Path(text)
    return path if path.is_file() or path.suffix in (".csv", ".tsv") else parse_names(text)


def parse_options(texts: Sequence[str], flag: str = "--option") -> dict[str, Any]:
    """``name=value`` pairs; true, false, none, numbers and lists of whole numbers get their types.

    Args:
        flag: the option that gave them, for errors.
    """
    words = {"true": True, "false": False, "none": None}
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(
                flag, expected="name=value", got=repr(text), remedy="write bn=false, say"
            )
        if value.lower() in words:
            options[name] = words[value.lower()]
        elif re.fullmatch(r"[+-]?\d+", value):
            options[name] = int(value)
        elif re.fullmatch(r"\d+(,\d+)+", value):
            options[name] = tuple(int(number) for number in value.split(","))
        elif re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
            options[name] = float(value)
        else:
            options[name] = value
    return options


def option_text(value: object) -> str:
    """A value as `parse_options` reads it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def parse_aggregators(texts: Sequence[str]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Names separated by commas, with options if any: ``abmil,dragn[unit=L3Agg,bn=false]``."""
    aggregators = []
    for text in texts:
        for piece in re.split(r",(?![^\[]*\])", text):
            match = re.fullmatch(r"([^\[\]\s]+)(?:\[([^\[\]]*)\])?", piece.strip())
            if match is None:
                raise InputError(
                    "--aggregator",
                    expected="names, as abmil,dragn[unit=L3Agg]",
                    got=repr(text),
                    remedy="correct it",
                )
            # A comma starts an option only where a name and an equals sign follow.
            options = re.split(r",(?=[^,=]+=)", match[2]) if match[2] else []
            aggregators.append((match[1], parse_options(options)))
    return tuple(aggregators)
