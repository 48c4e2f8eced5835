"""Doubts about a table of bags: what may be meant as it is, and misleads where it is not.

A doubt is a `Fault` that stops nobody: `check` lists it beside the faults, and every command that
learns from the table, or makes a store with it, says it as a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from dragn_cache.manifest.records import Bag
from dragn_cache.manifest.tables import Fault
from dragn_cache.texts import difference, look_alikes
from dragn_cache.types import Task, Warn

Kind = Literal["label", "bag", "group"]
# As programs write a cell that is empty. "none" is left out: there may be such a class.
_MISSING = frozenset({"na", "n/a", "nan", "<na>", "#n/a", "nat", "null"})
_NAMES: Mapping[Kind, Callable[[Bag], Iterable[str]]] = {
    "label": lambda bag: bag.labels or (),
    "bag": lambda bag: (bag.bag_id,),
    "group": lambda bag: (bag.group,) if bag.group else (),
}


def check_doubts(bags: Sequence[Bag], task: Task | None) -> list[Fault]:
    """Labels, bags and groups whose names mislead, and empty cells of labels that may.

    Args:
        task: None for some bags of a table, whose empty cells tell nothing.
    """
    doubts: list[Fault] = []
    for kind, names in _NAMES.items():
        first: dict[str, Bag] = {}
        for bag in bags:
            for name in names(bag):
                first.setdefault(name, bag)
        doubts += _look_alikes(kind, first)
        doubts += _mixed_numbers(kind, first)
        if kind != "bag":
            doubts += _missing_marks(kind, first)
    if task == "multilabel":
        doubts += _empty_labels(bags)
    return doubts


def warn_doubts(bags: Sequence[Bag], task: Task | None, warn: Warn) -> None:
    """Report the doubts of `check_doubts`, the first of each kind with the number of the others."""
    by_kind: dict[str, list[Fault]] = {}
    for doubt in check_doubts(bags, task):
        by_kind.setdefault(doubt.kind, []).append(doubt)
    for doubts in by_kind.values():
        more = f" (and {len(doubts) - 1} more such)" if len(doubts) > 1 else ""
        warn(f"{doubts[0]}{more}")


def _at(bag: Bag, kind: str, expected: str, got: str, remedy: str) -> Fault:
    return Fault(kind, bag.file, bag.line, expected, got, remedy)


def _look_alikes(kind: Kind, first: Mapping[str, Bag]) -> list[Fault]:
    return [
        _at(
            first[name],
            f"look-alike-{kind}",
            f"names of {kind}s that can be told apart",
            f"{name!r} here and {other!r} at line {first[other].line}, which differ by "
            f"{difference(name, other)}",
            "write them alike if they are one, or rename one of them",
        )
        for other, name in look_alikes(first)
    ]


def _mixed_numbers(kind: Kind, first: Mapping[str, Bag]) -> list[Fault]:
    """A doubt where ``1.0`` and ``2`` are among the names: half of a column has been floats."""
    floats = [name for name in first if re.fullmatch(r"[+-]?\d+\.0+", name)]
    whole = [name for name in first if re.fullmatch(r"[+-]?\d+", name)]
    if not floats or not whole:
        return []
    return [
        _at(
            first[floats[0]],
            f"mixed-number-{kind}",
            f"names of {kind}s written in one way",
            f"{floats[0]!r} here and {whole[0]!r} at line {first[whole[0]].line}: they are texts, "
            "not numbers",
            "write all without '.0'",
        )
    ]


def _missing_marks(kind: Kind, first: Mapping[str, Bag]) -> list[Fault]:
    wish = {
        "label": "leave the cell empty if the bag has no label",
        "group": "leave the cell empty: else all such bags are one group",
        "bag": "",
    }[kind]
    return [
        _at(bag, f"missing-{kind}", f"the name of a {kind}", f"{name!r}, a name as others", wish)
        for name, bag in first.items()
        if name.casefold() in _MISSING
    ]


def _empty_labels(bags: Sequence[Bag]) -> list[Fault]:
    """A doubt where bags have one of several labels, or none: classes with gaps look like that."""
    counts = {len(bag.labels) for bag in bags if bag.labels is not None}
    labels = {label for bag in bags for label in bag.labels or ()}
    if counts != {0, 1} or len(labels) < 2:
        return []
    empty = [bag for bag in bags if bag.labels == ()]
    return [
        _at(
            empty[0],
            "empty-labels",
            f"a label for bag {empty[0].bag_id!r}, as all others have one and none has two",
            f"none for {len(empty)} of {len(bags)} bags, which count as having none of the "
            f"{len(labels)} labels",
            "fill them in or leave those bags out, if their labels are unknown",
        )
    ]
