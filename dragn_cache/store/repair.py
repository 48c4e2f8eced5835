"""Moving damaged parts aside, so that the same extraction writes only those again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from dragn_cache.files import sync_folder
from dragn_cache.store.claims import Claims
from dragn_cache.store.reader import Store
from dragn_cache.store.tables import TABLES
from dragn_cache.types import Say

ASIDE = "damaged"


def move_aside(store: Store, parts: Sequence[int], say: Say = lambda line: None) -> list[Path]:
    """Move parts into ``STORE/damaged/``, where nothing reads them; returns their new paths."""
    folder = store.path / ASIDE
    moved = []
    with Claims(store.path / "parts") as claims:
        claims.wait(TABLES, say)
        for number in parts:
            source = store.part_path(number)
            folder.mkdir(exist_ok=True)
            names = (f"{source.stem}.{k}{source.suffix}" for k in itertools.count(1))
            target = next(folder / name for name in names if not (folder / name).exists())
            source.rename(target)
            moved.append(target)
        if moved:
            sync_folder(folder)
            sync_folder(store.path / "parts")
    return moved
