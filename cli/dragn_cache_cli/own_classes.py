"""Aggregators of one's own: where their modules are looked for."""

from __future__ import annotations

import sys
from pathlib import Path


def find_own_classes() -> None:
    """Let modules in the working directory be imported, after all others."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
