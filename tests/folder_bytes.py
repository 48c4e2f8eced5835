"""A folder as bytes, to compare with another."""

from __future__ import annotations

from pathlib import Path


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, by its path in it."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }
