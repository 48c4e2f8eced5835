"""The folder of a cross-validation: the settings it was begun with, and finished trainings."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import tomli_w

from dragn_cache.checksums import CHECKSUMS, changed_files, require_unchanged
from dragn_cache.errors import InputError, StoreMismatchError, foreign
from dragn_cache.files import require_new, write_text
from dragn_cache.store import differences, json_digest
from dragn_cache.studies.tables import Place, Training

COMPARED_SETTINGS = ("crossval", "data", "methods")
FILES = (
    "config.toml",
    "splits.csv",
    "folds.csv",
    "summary.csv",
    "comparison.csv",
    "predictions.csv",
)
TRAININGS = 2
"""The version of what a training with the same settings does; 1 in folders that do not say."""
DIGEST = "sha256"
"""The key of a training's file that has the digest of all others."""
MAY_CHANGE = ("seeds", "intervals", "decision")  # no finished training depends on them


def read_config(out: Path) -> dict[str, Any]:
    """The settings that a folder was begun with; empty for a new one."""
    path = out / "config.toml"
    if not path.is_file():
        require_new(out)
        return {}
    require_unchanged(path)
    with foreign(path, expected="TOML", remedy="give another `out`"):
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    if "crossval" not in record:
        raise InputError(
            str(out),
            expected="a new folder, or a cross-validation's",
            got="another one with a config.toml",
            remedy="give another `out`",
        )
    return record


def begin(
    out: Path, before: dict[str, Any], record: dict[str, Any], tasks: Sequence[Place]
) -> None:
    """Write config.toml, or refuse to mix; methods and seeds may be added to what there is.

    Args:
        before: as `read_config` gave it; ``record``: the settings now, ``tasks``: all trainings.
    """
    record = tomllib.loads(tomli_w.dumps(record))  # tuples become lists
    record["crossval"]["trainings"] = TRAININGS
    if before:
        began = before["crossval"].get("trainings", 1)
        if began != TRAININGS:
            _require_finished(out, tasks)
            record["crossval"]["trainings"] = began
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
    (out / CHECKSUMS).unlink(missing_ok=True)  # of tables that are going to be other ones
    write_text(out / "config.toml", tomli_w.dumps(record))
    (out / "trainings").mkdir(exist_ok=True)


def _require_finished(out: Path, tasks: Sequence[Place]) -> None:
    """Raise unless nothing is left to train, since trainings of another version go another way."""
    if any(read_training(out, task) is None for task in tasks):
        raise StoreMismatchError(
            str(out),
            expected="trainings of this version",
            got="those of one whose heads started at 0, and whose recursive units had batch "
            "normalisation unless told not to",
            remedy="give another `out`",
        )


def _compared(record: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a record that another one must share."""
    both = {k: v for k, v in record["methods"].items() if k in other["methods"]}
    fixed = {k: v for k, v in record["crossval"].items() if k not in (*MAY_CHANGE, "trainings")}
    return {"crossval": fixed, "data": record["data"], "methods": both}


def _path(out: Path, task: Place) -> Path:
    label, seed, fold = task
    return out / "trainings" / quote(label, safe="=,+") / f"seed{seed}-fold{fold}.json"


def read_training(out: Path, task: Place) -> Training | None:
    """A finished training; None where there is none, or one that failed.

    Raises:
        InputError: its file is not as it was written.
    """
    path = _path(out, task)
    if not path.is_file():
        return None
    training = _parse(path)
    return None if training.error else training


def _parse(path: Path) -> Training:
    with foreign(
        path,
        expected="a training of this cross-validation",
        remedy="remove the file; the same command trains it again",
    ):
        record = json.loads(path.read_text(encoding="utf-8"))
        recorded = record.pop(DIGEST, None)  # older versions wrote none
        if recorded not in (None, json_digest(record)):
            raise ValueError("other values than were written")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in record.items()
        }
        return Training(**values)


def write_training(out: Path, training: Training) -> None:
    """Write the file of a finished training, or of one that failed."""
    path = _path(out, training.task)
    path.parent.mkdir(exist_ok=True)
    record = json.loads(json.dumps(asdict(training)))
    write_text(path, json.dumps({**record, DIGEST: json_digest(record)}) + "\n")


def is_study(folder: Path) -> bool:
    """Whether a folder is a cross-validation's."""
    return (folder / "trainings").is_dir()


def verify_study(out: Path) -> list[str]:
    """A line for each file of a cross-validation that is lost or not as it was written.

    Until it is finished, its tables have no digests; each training has its own.
    """
    faults = [f"{out / name}: lost, or not as it was written" for name in changed_files(out, FILES)]
    for path in sorted((out / "trainings").rglob("*.json")):
        try:
            _parse(path)
        except InputError as error:
            faults.append(f"{path}: {error.got}")
    return faults
