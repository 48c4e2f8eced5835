"""CSV tables with the line of every row, so that faults can point at it. Cells stay text."""

from __future__ import annotations

import ast
import csv
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dragn_cache.errors import ManifestError
from dragn_cache.files import (
    LONGEST_CELL,
    MOST_TABLE_BYTES,
    is_storable,
    open_regular,
)


@dataclass(frozen=True)
class Fault:
    """One thing wrong with a data set, at one line of one file."""

    kind: str
    file: str
    line: int
    expected: str
    got: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind}: expected {self.expected}, got {self.got}; {self.remedy}"

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    def error(self, others: int = 0) -> ManifestError:
        """The fault as an exception that also says how many other faults there are."""
        more = f" (and {others} more: run dragn-cache check)" if others else ""
        return ManifestError(
            self.where, expected=self.expected, got=self.got, remedy=self.remedy + more
        )


@dataclass(frozen=True)
class Row:
    """One row of a table: its cells by column name, stripped, and its file and line."""

    cells: dict[str, str]
    file: str
    line: int

    def fault(self, kind: str, expected: str, got: str, remedy: str) -> Fault:
        """A fault at this row."""
        return Fault(kind, self.file, self.line, expected, got, remedy)


def read_table(path: Path) -> list[Row]:
    """Read a CSV (or, by its ending, a TSV) with a header line.

    Raises:
        ManifestError: the file is missing, not readable, not UTF-8 or without a header, a quote is
            not closed, or a row has another number of cells than the header.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        # Newlines are left to the csv module: within quotes they belong to the cell.
        with (
            open_regular(path, MOST_TABLE_BYTES) as file,
            io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text,
        ):
            lines = _read_lines(path, csv.reader(text, delimiter=delimiter, strict=True))
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        got = "no such file" if missing else error.strerror or str(error)
        raise ManifestError(
            str(path), expected="a table", got=got, remedy="correct the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ManifestError(
            str(path), expected="UTF-8 text", got=str(error), remedy="save it as UTF-8"
        ) from error
    head = [cell.strip() for cell in lines[0][1]] if lines else []
    if not any(head) or len(set(head)) != len(head) or not all(map(is_storable, head)):
        raise ManifestError(
            f"{path}:1",
            expected="a header of distinct column names",
            got=delimiter.join(head).replace("\0", "\\0") or "an empty line",
            remedy="correct the first line",
        )
    name = path.name  # once, not for each row: pathlib computes it each time
    return [_row(path, name, head, line, cells) for line, cells in lines[1:]]


def _read_lines(path: Path, reader: Any) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the line it starts at."""
    lines = []
    start = 1
    try:
        for cells in reader:
            if cells or start == 1:
                lines.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(
            f"{path}:{start}",
            expected=f"cells with balanced quotes, of {LONGEST_CELL} characters at most",
            got=str(error),
            remedy="correct the row that starts there",
        ) from error
    return lines


def _row(path: Path, name: str, head: Sequence[str], line: int, cells: Sequence[str]) -> Row:
    if len(cells) != len(head):
        raise ManifestError(
            f"{path}:{line}",
            expected=f"{len(head)} cells, as in the header",
            got=str(len(cells)),
            remedy="quote cells that contain the separator",
        )
    return Row(dict(zip(head, map(str.strip, cells), strict=True)), name, line)


def split_cell(cell: str) -> tuple[str, ...]:
    """The items of a cell: ``a;b``, or a Python list literal such as ``['a', 'b']``.

    Items are stripped; empty ones and repetitions are dropped, the order is kept.
    """
    items = _list_literal(cell) if cell.startswith("[") and cell.endswith("]") else None
    stripped = (item.strip() for item in (cell.split(";") if items is None else items))
    return tuple(dict.fromkeys(item for item in stripped if item))


def join_cell(items: Sequence[str]) -> str:
    """The cell that `split_cell` splits into these items: ``a;b``, or a list literal if needed."""
    cell = ";".join(items)
    return cell if split_cell(cell) == tuple(items) else repr(list(items))


def _list_literal(cell: str) -> list[str] | None:
    try:
        with warnings.catch_warnings():  # of backslashes, in paths from another system
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            items = ast.literal_eval(cell)
            return list(map(str, items)) if isinstance(items, list) else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # as ast documents
        return None
