"""The folder of a cross-validation: the settings it was begun with, and finished trainings."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tomli_w

from dragn_cache.errors import InputError, StoreMismatchError, foreign
from dragn_cache.files import MOST_TABLE_BYTES, read_text, require_new, write_text
from dragn_cache.store import differences
from dragn_cache.studies.tables import Place, Training

COMPARED_SETTINGS = ("crossval", "data", "methods")
MAY_CHANGE = ("seeds", "intervals", "decision")  # no finished training depends on them


def read_config(out: Path) -> dict[str, Any]:
    """The settings that a folder was begun with; empty for a new one."""
    path = out / "config.toml"
    if not path.is_file():
        require_new(out)
        return {}
    with foreign(path, expected="TOML", remedy="give another `out`"):
        record = tomllib.loads(read_text(path))
    if "crossval" not in record:
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
                remedy="give another `out`, or remove this folder",
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


def read_training(out: Path, task: Place) -> Training | None:
    """A finished training; None where there is none, or one that failed."""
    path = _path(out, task)
    if not path.is_file():
        return None
    with foreign(
        path,
        expected="a training of this cross-validation",
        remedy="remove the file; the same command trains it again",
    ):
        values = json.loads(read_text(path, MOST_TABLE_BYTES)).items()
        record: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values}
        training = Training(**record)
    return None if training.error else training


def write_training(out: Path, training: Training) -> None:
    """Write the file of a finished training, or of one that failed."""
    path = _path(out, training.task)
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(asdict(training)) + "\n")
