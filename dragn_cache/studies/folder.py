"""The folder of a cross-validation: the settings it was begun with, and finished trainings."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import tomli_w
from pydantic import TypeAdapter

from dragn_cache.checksums import CHECKSUMS, changed_files, require_unchanged
from dragn_cache.errors import InputError, StoreMismatchError, foreign
from dragn_cache.files import (
    MOST_TABLE_BYTES,
    read_text,
    require_new,
    unwritable,
    write_text,
)
from dragn_cache.store import differences, json_digest
from dragn_cache.store.claims import Claims, describe_holder
from dragn_cache.studies.tables import Place, Training, Truth

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
TRAINING = TypeAdapter(Training)
MAY_CHANGE = ("seeds", "intervals", "decision")  # no finished training depends on them
CLAIM = "crossval"


@contextmanager
def claimed_folder(out: Path) -> Iterator[None]:
    """A folder in which no other process cross-validates; what a killed one left is removed.

    Raises:
        InputError: another process works in it, it cannot be written, or it holds something else.
    """
    read_config(out)
    is_made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        claims = Claims(out)
        is_ours = claims.acquire(CLAIM)
    except OSError as error:
        raise unwritable(out, error) from error
    try:
        with claims:
            if not is_ours:
                raise InputError(
                    str(out),
                    expected="a folder that nobody else cross-validates in",
                    got=describe_holder(claims.path(CLAIM)) or "another process that does",
                    remedy="let it finish, or give another `out`",
                )
            for left in [*out.glob(".*.tmp"), *out.glob("trainings/*/.*.tmp")]:
                left.unlink()
            yield
    finally:
        if is_made:  # and perhaps nothing was begun
            with suppress(OSError):
                out.rmdir()


def read_config(out: Path) -> dict[str, Any]:
    """The settings that a folder was begun with; empty for a new one."""
    path = out / "config.toml"
    if not path.is_file():
        require_new(out)
        return {}
    require_unchanged(path)
    with foreign(path, expected="TOML", remedy="give another `out`"):
        record = tomllib.loads(read_text(path))
    sections = [record.get(name) for name in COMPARED_SETTINGS]
    if not all(isinstance(section, dict) for section in sections):
        raise InputError(
            str(out),
            expected="a new folder, or a cross-validation's",
            got="another one with a config.toml",
            remedy="give another `out`",
        )
    return record


def begin(
    out: Path,
    before: dict[str, Any],
    record: dict[str, Any],
    tasks: Sequence[Place],
    truth: Truth,
) -> None:
    """Write config.toml, or refuse to mix; methods and seeds may be added to what there is.

    Args:
        before: as `read_config` gave it; ``record``: the settings now.
        tasks: all trainings; ``truth``: what they are scored against.
    """
    record = tomllib.loads(tomli_w.dumps(record))  # tuples become lists
    record["crossval"]["trainings"] = TRAININGS
    if before:
        began = before["crossval"].get("trainings", 1)
        if began != TRAININGS:
            _require_finished(out, tasks, truth)
            record["crossval"]["trainings"] = began
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
    (out / CHECKSUMS).unlink(missing_ok=True)  # of tables that are going to be other ones
    write_text(out / "config.toml", tomli_w.dumps(record))
    (out / "trainings").mkdir(exist_ok=True)


def _require_finished(out: Path, tasks: Sequence[Place], truth: Truth) -> None:
    """Raise unless nothing is left to train, since trainings of another version go another way."""
    if any(read_training(out, task, truth) is None for task in tasks):
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


def read_training(out: Path, task: Place, truth: Truth | None = None) -> Training | None:
    """A finished training; None where there is none, or one that failed.

    Args:
        truth: with which its probabilities must go.

    Raises:
        InputError: its file is not as it was written, or not of this training.
    """
    path = _path(out, task)
    if not path.is_file():
        return None
    training = _parse(path)
    with _reading(path):
        if training.task != task:
            raise ValueError(f"that of {training.task}")
        if training.error:
            return None
        if truth is not None:
            _require_probabilities(training, truth)
    return training


def _reading(path: Path) -> AbstractContextManager[None]:
    return foreign(
        path,
        expected="a training of this cross-validation",
        remedy="move the file away; the same command trains it again",
    )


def _parse(path: Path) -> Training:
    with _reading(path):
        record = json.loads(read_text(path, MOST_TABLE_BYTES))
        recorded = record.pop(DIGEST, None)  # older versions wrote none
        if recorded not in (None, json_digest(record)):
            raise ValueError("other values than were written")
        return TRAINING.validate_python(record)


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
