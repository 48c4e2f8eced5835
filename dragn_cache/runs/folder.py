"""Tables of a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from dragn_cache.checksums import require_unchanged
from dragn_cache.classical import MachineChoice
from dragn_cache.errors import InputError
from dragn_cache.files import write_csv
from dragn_cache.loading.labelling import Labelling
from dragn_cache.manifest.tables import Row, read_table
from dragn_cache.scoring.decisions import Decision, decide
from dragn_cache.scoring.metrics import evaluate
from dragn_cache.store import Store
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.fit import ClassicalFitted, Fitted, settings_read
from dragn_cache.types import Task


def run_name(store: Path, config: TrainConfig) -> str:
    """A folder name for a run: the store, the method and its options, the seed."""
    return f"{store.name.removesuffix('.features')}-{config.label}-s{config.seed}"


# --- writing and reading a run -----------------------------------------------------------------


def score_split(
    targets: NDArray[np.int8],
    probabilities: NDArray[np.float64],
    rows: NDArray[np.int64],
    task: Task,
    decision: Decision,
    config: TrainConfig,
) -> dict[str, Any]:
    """The scores of some bags, as `evaluate` gives them."""
    return evaluate(
        targets[rows],
        probabilities[rows],
        task=task,
        decision=decision,
        intervals=config.intervals,
        seed=config.seed,
    )


def write_predictions(
    path: Path,
    labelling: Labelling,
    splits: Sequence[str],
    probabilities: NDArray[np.float64],
    decision: Decision,
) -> None:
    """Write bag_id, split, y_<label>…, p_<label>…, d_<label>…; y is empty without labels."""
    columns = [f"{kind}_{label}" for kind in "ypd" for label in labelling.labels]
    head = ["bag_id", "split", *columns]
    targets = labelling.targets().tolist()
    decided = decide(probabilities, labelling.task, decision).tolist()
    blank = [""] * len(labelling.labels)
    write_csv(
        path,
        head,
        (
            [bag.bag_id, split, *(blank if bag.labels is None else y), *map(repr, p), *d]
            for bag, split, y, p, d in zip(
                labelling.bags, splits, targets, probabilities.tolist(), decided, strict=True
            )
        ),
    )


def write_history(out: Path, trained: Fitted, labels: Sequence[str]) -> None:
    """Write the losses by epoch, or without epochs the machine that was chosen for each label."""
    if isinstance(trained, ClassicalFitted):
        head = ["label", *(field.name for field in fields(MachineChoice))]
        rows = ([k, *astuple(choice)] for k, choice in zip(labels, trained.choices, strict=True))
        write_csv(out / "selection.csv", head, rows)
        return
    write_csv(out / "history.csv", list(trained.history[0]), (r.values() for r in trained.history))


def config_toml(config: TrainConfig, labelling: Labelling, store: Store) -> str:
    """The text of a run's config.toml: the settings that its method reads, and its data."""
    record = {
        "train": settings_read(config),
        "data": {
            "name": store.name,
            "task": labelling.task,
            "labels": list(labelling.labels),
            "features": store.description.digest("features"),
            "numerics": store.description.digest("numerics"),
        },
    }
    return tomli_w.dumps(record)


def run_table(run: Path, name: str, columns: Sequence[str]) -> list[Row]:
    """The rows of one of a run's tables, which has these columns and a row at least.

    Each bag has one row: a second one would count twice, or replace the first.
    """
    path = run / name
    rows = []
    if path.is_file():
        require_unchanged(path)
        rows = read_table(path)
    missing = [column for column in columns if not rows or column not in rows[0].cells]
    if missing:
        raise InputError(
            str(path),
            expected=f"the run's table with {missing[0]}",
            got="none" if path.is_file() else "no such file",
            remedy="give a run folder of train-agg, with all its files",
        )
    lines: dict[str, int] = {}
    for row in rows:
        bag_id = row.cells["bag_id"]
        if bag_id in lines:
            raise InputError(
                f"{path}:{row.line}",
                expected="one row for each bag",
                got=f"{bag_id!r} again (first at line {lines[bag_id]})",
                remedy="remove one of them, or restore the file",
            )
        lines[bag_id] = row.line
    return rows
