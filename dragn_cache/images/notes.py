"""Remarks of decoders on images that they decode all the same, kept with the image they are about.

Pillow says them as warnings, tifffile in its log; neither names the file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


@contextmanager
def noting() -> Iterator[list[str]]:
    """Collect what is remarked in this thread; nothing is unless `listening`."""
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


@contextmanager
def listening() -> Iterator[None]:
    """Let `noting` hear the decoders, in all threads; warnings and logs belong to the process."""
    log, handler = logging.getLogger("tifffile"), _Handler(logging.WARNING)
    propagated = log.propagate
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"PIL\b")
        show = warnings.showwarning

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            notes = _notes.get()
            if notes is None:
                show(message, category, filename, lineno, file, line)
            else:
                notes.append(" ".join(str(message).split()))

        warnings.showwarning = note
        log.addHandler(handler)
        log.propagate = False
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.propagate = propagated


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        notes = _notes.get()
        if notes is not None:
            notes.append(" ".join(record.getMessage().split()))
