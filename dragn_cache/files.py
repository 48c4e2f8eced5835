"""Writing files so that they are whole or absent: beside, flushed, fsynced, renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_unfinished(path: Path) -> bool:
    """Whether a file is what a killed `write_bytes` left beside its own."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def sync_folder(folder: Path) -> None:
    """Make a folder's names durable (a rename is not until then)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """fsync a file, or every file and folder below a folder, contents first."""
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
