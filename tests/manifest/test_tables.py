"""Tables: a cell is read as it was written, and every row has its line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragn_cache.errors import ManifestError
from dragn_cache.manifest.tables import Fault, join_cell, read_table, split_cell

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(str.strip)


def write(tmp_path: Path, text: str | bytes, name: str = "bags.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_cells_are_text_stripped_and_know_their_line(tmp_path: Path) -> None:
    rows = read_table(write(tmp_path, "bag_id, n\n 007 ,NA\n\n1e5,nan\n"))
    assert [(row.cells, row.file, row.line) for row in rows] == [
        ({"bag_id": "007", "n": "NA"}, "bags.csv", 2),
        ({"bag_id": "1e5", "n": "nan"}, "bags.csv", 4),
    ]


def test_a_row_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    rows = read_table(write(tmp_path, 'a,b\n"x\ny\nz",1\nlast,2\n'))
    assert [(row.cells["a"], row.line) for row in rows] == [("x\ny\nz", 2), ("last", 5)]


@pytest.mark.parametrize("break_", ["\u2028", "\u0085", "\x0b", "\x0c", "\x1e"])
def test_only_newlines_end_a_row(tmp_path: Path, break_: str) -> None:
    (row,) = read_table(write(tmp_path, f"a,b\nx{break_}y,1\n"))
    assert row.cells == {"a": f"x{break_}y", "b": "1"}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_newlines_of_every_system_and_a_byte_order_mark(tmp_path: Path, newline: str) -> None:
    rows = read_table(write(tmp_path, "\ufeff" + newline.join(["bag_id,b", "é,1", "u,2", ""])))
    assert [(row.cells["bag_id"], row.line) for row in rows] == [("é", 2), ("u", 3)]


def test_a_tsv_is_separated_by_tabs(tmp_path: Path) -> None:
    (row,) = read_table(write(tmp_path, "a\tb\nx,y\tz\n", "bags.tsv"))
    assert row.cells == {"a": "x,y", "b": "z"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"bags\.csv:1: expected a header of distinct column names, got an empty line"),
        ("\na,b\n", r"bags\.csv:1: expected a header .* got an empty line"),
        ("a,b,a\n1,2,3\n", r"bags\.csv:1: expected a header .* got a,b,a"),
        ("a,b\n1,2\n1,2,3\n", r"bags\.csv:3: expected 2 cells, as in the header, got 3"),
        ("a,b\n1,2\n\n1\n", r"bags\.csv:4: expected 2 cells, as in the header, got 1"),
        ('a,b\n1,2\n"x,3\ny,4\n', r"bags\.csv:3: expected cells with balanced quotes"),
        (
            "a,b\nx,1\n" + "y" * 131_073 + ",2\n",
            r"bags\.csv:3: .*of 131072 characters at most, got fi",
        ),
        ("a,b\0\n1,2\n", r"bags\.csv:1: expected a header .*, got a,b\\0;"),
        (b"a,b\n\xff,2\n", r"bags\.csv: expected UTF-8 text.*save it as UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        read_table(write(tmp_path, text))


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="expected a table, got no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ManifestError, match="expected a table, got Is a directory"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ("", ()),
        (";; ;", ()),
        ("[]", ()),
        ("a", ("a",)),
        ("b; a ;b", ("b", "a")),
        ("['b', \"a;c\", 'b', ' ', ' d ']", ("b", "a;c", "d")),
        ("[1, 2]", ("1", "2")),
        (r"['x\dy.png']", (r"x\dy.png",)),
        ("[broken", ("[broken",)),
        ("[not a literal]", ("[not a literal]",)),
        ("a,b", ("a,b",)),
    ],
)
def test_a_cell_holds_items(cell: str, items: tuple[str, ...]) -> None:
    assert split_cell(cell) == items


@given(st.lists(TEXT.filter(bool), unique=True, max_size=5))
def test_joined_cells_split_into_the_same_items(items: list[str]) -> None:
    assert split_cell(join_cell(items)) == tuple(items)


@given(st.lists(st.tuples(TEXT, TEXT), max_size=5))
def test_what_the_csv_module_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *cells])
    assert [tuple(row.cells.values()) for row in read_table(path)] == cells


def test_a_fault_says_where_and_how_many_more_there_are() -> None:
    fault = Fault("bad-box", "instances.csv", 7, "four numbers", "three", "correct it")
    assert str(fault) == ("instances.csv:7: bad-box: expected four numbers, got three; correct it")
    assert str(fault.error(2)) == (
        "instances.csv:7: expected four numbers, got three; "
        "correct it (and 2 more: run dragn-cache check)"
    )
    assert Fault("image-without-bag", "a/b.png", 0, "", "", "").where == "a/b.png"
