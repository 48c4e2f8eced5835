"""The folder of a cross-validation: the settings it was begun with, and finished trainings."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import tomli_w
from pydantic import TypeAdapter

from dragn_cache.errors import InputError, StoreMismatchError, foreign
from dragn_cache.files import require_new, write_text
from dragn_cache.store import differences
from dragn_cache.studies.tables import Place, Training, Truth

COMPARED_SETTINGS = ("crossval", "data", "methods")
TRAINING = TypeAdapter(Training)
MAY_CHANGE = ("seeds", "intervals", "decision")  # no finished training depends on them


def read_config(out: Path) -> dict[str, Any]:
    """The settings that a folder was begun with; empty for a new one."""
    path = out / "config.toml"
    if not path.is_file():
        require_new(out)
        return {}
    with foreign(path, expected="TOML", remedy="give another `out`"):
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    sections = [record.get(name) for name in COMPARED_SETTINGS]
    if not all(isinstance(section, dict) for section in sections):
        raise InputError(
            str(out),
            expected="a new folder, or a cross-validation's",
            got="another one with a config.toml",
            remedy="give another `out`",
        )
    return record


def begin(out: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    """Write config.toml, or refuse to mix; methods and seeds may be added to what there is."""
    record = tomllib.loads(tomli_w.dumps(record))  # tuples become lists
    if before:
        changes = differences(
            _compared(before, record), _compared(record, before), COMPARED_SETTINGS
        )
        if changes:
            raise StoreMismatchError(
                str(out),
                expected="the settings that it was begun with",
                got=" · ".join(changes),
                remedy="give another `out`",
            )
        record["methods"] = {**before["methods"], **record["methods"]}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.toml", tomli_w.dumps(record))
    (out / "trainings").mkdir(exist_ok=True)


def _compared(record: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a record that another one must share."""
    both = {k: v for k, v in record["methods"].items() if k in other["methods"]}
    fixed = {k: v for k, v in record["crossval"].items() if k not in MAY_CHANGE}
    return {"crossval": fixed, "data": record["data"], "methods": both}


def _path(out: Path, task: Place) -> Path:
    label, seed, fold = task
    return out / "trainings" / quote(label, safe="=,+") / f"seed{seed}-fold{fold}.json"


def read_training(out: Path, task: Place, truth: Truth) -> Training | None:
    """A finished training; None where there is none, or one that failed.

    Raises:
        InputError: the file is not of this training.
    """
    path = _path(out, task)
    if not path.is_file():
        return None
    with foreign(
        path,
        expected="a training of this cross-validation",
        remedy="move the file away; the same command trains it again",
    ):
        training = TRAINING.validate_json(path.read_bytes(), strict=True)
        if training.task != task:
            raise ValueError(f"that of {training.task}")
        if not training.error:
            _require_probabilities(training, truth)
    return None if training.error else training


def _require_probabilities(training: Training, truth: Truth) -> None:
    """Raise ValueError unless there is one probability for each bag and label."""
    splits = truth.splits(training.seed, training.fold)
    for split, rows in (("test", training.probabilities), ("validation", training.validation)):
        values = np.array(rows, float).reshape(len(rows), -1)
        shape = int((splits == split).sum()), len(truth.labels)
        if values.shape != shape or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"other {split} probabilities than {shape[0]} of {shape[1]}")


def write_training(out: Path, training: Training) -> None:
    """Write the file of a finished training, or of one that failed."""
    path = _path(out, training.task)
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(asdict(training)) + "\n")
