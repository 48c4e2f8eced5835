"""Warnings of libraries: what tells a user nothing stays off the screen.

A library warns whoever calls it, not who uses the program. Two kinds go on as lines of ours: what
numpy says of numbers in this package, and what code of the user's warns of. With `-W`,
`PYTHONWARNINGS` or `DRAGN_CACHE_DEBUG` all is as Python has it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

import dragn_cache

DEBUG = "DRAGN_CACHE_DEBUG"
OURS = (Path(__file__).parent, Path(dragn_cache.__file__).parent)


def quiet_libraries() -> None:
    """Keep libraries' warnings and logs off the screen, in this process and those it starts."""
    if sys.warnoptions or os.environ.get(DEBUG):
        return
    warnings.showwarning = _show
    os.environ["PYTHONWARNINGS"] = "ignore"
    logging.getLogger().addHandler(logging.NullHandler())  # else Python prints what no one handles


def is_users(file: Path) -> bool:
    """Whether a file of code is the user's: not of this package, an installed one or Python."""
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    known = (*OURS, Path(os.__file__).parent)
    return file.suffix == ".py" and not installed and not any(map(file.is_relative_to, known))


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    place = Path(filename)
    numbers = issubclass(category, RuntimeWarning) and any(map(place.is_relative_to, OURS))
    if numbers or is_users(place):
        from dragn_cache_cli import screen

        screen.warn(f"{place.name}:{lineno}: {' '.join(str(message).split())}")
