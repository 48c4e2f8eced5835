"""Stage masks: labels that only bags of some stages can have (FRN, section IV.A and table II).

A table lists the stages in which some labels exist; every other label exists in all. A bag's stage
is in its ``stage`` column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dragn_cache.errors import InputError, SettingError, UnknownNameError
from dragn_cache.manifest.tables import read_table, split_cell
from dragn_cache.types import Task

StageTable = Mapping[str, Sequence[str]]
"""Labels to the stages that they exist in."""


def read_stage_table(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a CSV with the columns ``label`` and ``stages``, stages separated by ``;``.

    Raises:
        ManifestError: the file cannot be read.
        InputError: it has no rows, other columns, a label twice, or a label without stages.
    """
    table: dict[str, tuple[str, ...]] = {}
    rows = read_table(path)
    if not rows or not {"label", "stages"} <= rows[0].cells.keys():
        raise InputError(
            str(path),
            expected="the columns label and stages, and a row for each label",
            got=", ".join(rows[0].cells) if rows else "no row",
            remedy="write a CSV with the lines label,stages and trunk mesoderm primordium,4;5, say",
        )
    for row in rows:
        label, stages = row.cells["label"], split_cell(row.cells["stages"])
        if not label or not stages or label in table:
            got = f"{label!r} again" if label in table else repr(",".join(row.cells.values()))
            raise InputError(
                f"{path}:{row.line}",
                expected="a label, once, and its stages",
                got=got,
                remedy="correct that row",
            )
        table[label] = stages
    return table


def possible_labels(
    table: StageTable, bags: Mapping[str, str], labels: Sequence[str], task: Task
) -> NDArray[np.bool_]:
    """(B, L): whether a bag can have a label.

    Args:
        table: labels to stages.
        bags: ids of the B bags to their stages, empty where none is known.
        labels: the L labels.

    Raises:
        UnknownNameError: the table has a label that is not among ``labels``.
        InputError: classes exclude each other, a bag has no stage, or no label can be had in it.
    """
    if task != "multilabel":
        raise SettingError(
            "stage_mask",
            expected="a multi-label task",
            got=task,
            remedy="leave it out: classes exclude each other here",
        )
    for label in table:
        if label not in labels:
            raise UnknownNameError("label of the stage table", label, labels)
    possible = np.ones((len(bags), len(labels)), np.bool_)
    for row, (bag_id, stage) in enumerate(bags.items()):
        possible[row] = [label not in table or stage in table[label] for label in labels]
        if not stage or not possible[row].any():
            raise InputError(
                f"bag {bag_id!r}",
                expected="a stage in which a label is possible",
                got=f"stage {stage!r}" if stage else "no stage",
                remedy="give bags.csv a stage column with the names that the stage table uses",
            )
    return possible
