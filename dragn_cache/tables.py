"""CSV tables with the line of every row, so that faults can point at it. Cells stay text."""

from __future__ import annotations

import ast
import csv
from dataclasses import dataclass
from pathlib import Path

from dragn_cache.errors import ManifestError


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
    """One row of a table: its cells by column name, stripped, and where it stands."""

    cells: dict[str, str]
    file: str
    line: int

    def fault(self, kind: str, expected: str, got: str, remedy: str) -> Fault:
        """A fault at this row."""
        return Fault(kind, self.file, self.line, expected, got, remedy)


def read_table(path: Path) -> list[Row]:
    """Read a CSV (or, by its ending, a TSV) with a header line.

    Raises:
        ManifestError: the file is missing, not UTF-8, without a header, or a row has another
            number of cells than the header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ManifestError(
            str(path), expected="a table", got="no such file", remedy="correct the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ManifestError(
            str(path), expected="UTF-8 text", got=str(error), remedy="save it as UTF-8"
        ) from error
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
    head = [cell.strip() for cell in next(reader, [])]
    if not any(head) or len(set(head)) != len(head):
        raise ManifestError(
            f"{path}:1",
            expected="a header of distinct column names",
            got=delimiter.join(head) or "an empty line",
            remedy="correct the first line",
        )
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(head):
            raise ManifestError(
                f"{path}:{reader.line_num}",
                expected=f"{len(head)} cells, as in the header",
                got=str(len(cells)),
                remedy="quote cells that contain the separator",
            )
        values = dict(zip(head, (cell.strip() for cell in cells), strict=True))
        rows.append(Row(values, path.name, reader.line_num))
    return rows


def split_cell(cell: str) -> tuple[str, ...]:
    """The items of a cell: ``a;b``, or a Python list literal such as ``['a', 'b']``.

    Repetitions are dropped, the order is kept; an empty cell has no items.
    """
    if cell.startswith("[") and cell.endswith("]"):
        try:
            items = ast.literal_eval(cell)
        except (ValueError, SyntaxError):
            items = None
        if isinstance(items, list):
            return tuple(dict.fromkeys(str(item) for item in items))
    return tuple(dict.fromkeys(part.strip() for part in cell.split(";") if part.strip()))
