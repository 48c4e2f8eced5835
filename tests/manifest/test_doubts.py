"""Doubts about a table of bags: what may be meant, and misleads where it is not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dragn_cache.manifest import Bag
from dragn_cache.manifest.doubts import check_doubts, warn_doubts
from dragn_cache.types import Task


def bags_of(
    labels: Sequence[str | None], *, ids: Sequence[str] = (), groups: Sequence[str] = ()
) -> list[Bag]:
    """Bags at lines 2, 3, … with labels separated by semicolons; None for no column."""
    return [
        Bag(
            ids[k] if ids else f"bag{'abcdefgh'[k]}",
            None if cell is None else tuple(cell.split(";")) if cell else (),
            group=groups[k] if groups else "",
            file="bags.csv",
            line=k + 2,
        )
        for k, cell in enumerate(labels)
    ]


def kinds(bags: Sequence[Bag], task: Task | None = "multilabel") -> list[tuple[str, str]]:
    return [(doubt.kind, doubt.where) for doubt in check_doubts(bags, task)]


@pytest.mark.parametrize(
    ("other", "way"),
    [
        ("Actin", "case"),
        ("actin\u200b", "U+200B"),
        ("act\u0456n", "U+0456 against U+0069"),
        ("\u0061\u0301ctin", ""),
    ],
)
def test_labels_that_look_alike_are_two(other: str, way: str) -> None:
    bags = bags_of(["actin;x", "golgi;x", f"x;{other}"])
    doubts = check_doubts(bags, "multilabel")
    assert [doubt.kind for doubt in doubts] == (["look-alike-label"] if way else [])
    for doubt in doubts:
        assert doubt.where == "bags.csv:4"
        assert doubt.got == f"{other!r} here and 'actin' at line 2, which differ by {way}"


def test_ids_and_groups_that_look_alike_are_told() -> None:
    bags = bags_of(["x;y"] * 4, ids=["007", "8", "7", "8.0"], groups=["P1", "P2", "p1", "P2"])
    assert kinds(bags) == [
        ("look-alike-bag", "bags.csv:4"),
        ("look-alike-bag", "bags.csv:5"),
        ("mixed-number-bag", "bags.csv:5"),
        ("look-alike-group", "bags.csv:4"),
    ]


def test_zeros_ones_and_empty_cells_are_told_twice() -> None:
    """A column of 0 and 1 with a gap, half of which has been through floats."""
    bags = bags_of(["0", "1.0", "", "0"])
    mixed, empty = check_doubts(bags, "multilabel")
    assert (mixed.kind, mixed.where) == ("mixed-number-label", "bags.csv:3")
    assert mixed.got == "'1.0' here and '0' at line 2: they are texts, not numbers"
    assert (empty.kind, empty.where) == ("empty-labels", "bags.csv:4")
    assert empty.got == "none for 1 of 4 bags, which count as having none of the 2 labels"


def test_empty_labels_are_told_where_classes_would_look_like_that() -> None:
    assert kinds(bags_of(["cat", "dog", ""])) == [("empty-labels", "bags.csv:4")]
    assert kinds(bags_of(["cat", "dog", "cat"]), "multiclass") == []
    assert kinds(bags_of(["cat", "dog;cat", ""])) == []
    assert kinds(bags_of(["cat", "", ""])) == []
    assert kinds(bags_of([None, None, None])) == []
    assert kinds(bags_of(["cat", "dog", ""]), None) == []


def test_marks_of_missing_cells_are_no_names() -> None:
    bags = bags_of(["a;b", "nan;a", "b;a"], groups=["g", "NA", "NA"], ids=["NA", "x", "y"])
    assert kinds(bags) == [("missing-label", "bags.csv:3"), ("missing-group", "bags.csv:3")]


def test_a_warning_names_the_first_of_a_kind_and_counts_the_others() -> None:
    said: list[str] = []
    warn_doubts(bags_of(["a;b"] * 5, ids=["A", "a", "B", "b", "c"]), "multilabel", said.append)
    assert said == [
        "bags.csv:3: look-alike-bag: expected names of bags that can be told apart, got 'a' here "
        "and 'A' at line 2, which differ by case; write them alike if they are one, or rename one "
        "of them (and 1 more such)"
    ]
