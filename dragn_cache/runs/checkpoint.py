"""Checkpoints of runs: their record, written, read and checked; stores they can be applied to."""

from __future__ import annotations

import importlib.util
import io
import reprlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dragn_cache.checksums import require_unchanged
from dragn_cache.errors import InputError, StoreMismatchError, foreign, reason
from dragn_cache.files import require_sound_archive, write_bytes
from dragn_cache.loading.labelling import Labelling
from dragn_cache.scoring.decisions import Decision
from dragn_cache.scoring.rules import require_rule_for
from dragn_cache.store import Store, differences
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.fit import Fitted, Model, load_model
from dragn_cache.types import Task, Warn

CHECKPOINT_VERSION = 2
WITH_BN = 1
"""The version whose recursive units had batch normalisation unless told not to."""
RECURSIVE = ("dragn", "hamil")
CHECKPOINT_DIGESTS = ("features", "numerics")  # of a store's provenance


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to be applied again.

    Attributes:
        config: the settings of its training, the tap resolved.
        in_shape: the shape of one instance, (C, h, w) or (C,).
        tap: name of the tap that it was trained on.
        labels: names of the L labels, in the order of the model's outputs.
        task: ``multilabel`` or ``multiclass``.
        best_epoch: the epoch that was kept; None without epochs.
        decision: the rule by which it decides; the default in files of before there was a choice.
        seen: digests of the features of its training and validation bags, by id; None in files of
            before these were kept.
        provenance: settings of its store, by kind: ``features`` and ``numerics``.
        state: the model's parameters and buffers by name.
    """

    config: TrainConfig
    in_shape: tuple[int, ...]
    tap: str
    labels: tuple[str, ...]
    task: Task
    best_epoch: int | None
    decision: Decision
    seen: Mapping[str, str] | None
    provenance: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        trained: Fitted,
        config: TrainConfig,
        labelling: Labelling,
        store: Store,
        decision: Decision,
        seen: Mapping[str, str],
    ) -> Checkpoint:
        """The checkpoint of a training on a store."""
        tap = store.tap(config.tap)
        return cls(
            config=config,
            in_shape=tap.shape,
            tap=tap.name,
            labels=labelling.labels,
            task=labelling.task,
            best_epoch=trained.best_epoch,
            decision=decision,
            seen=seen,
            provenance={k: store.description.provenance[k] for k in CHECKPOINT_DIGESTS},
            state=trained.model.state_dict(),
        )


# --- writing and reading -----------------------------------------------------------------------


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all."""
    record = {
        "version": CHECKPOINT_VERSION,
        "config": checkpoint.config.to_dict(),
        "in_shape": list(checkpoint.in_shape),
        "tap": checkpoint.tap,
        "labels": list(checkpoint.labels),
        "task": checkpoint.task,
        "best_epoch": checkpoint.best_epoch,
        "decision": asdict(checkpoint.decision),
        "seen": checkpoint.seen,
        "provenance": checkpoint.provenance,
        "state": checkpoint.state,
    }
    if checkpoint.seen is None:
        del record["seen"]
    content = io.BytesIO()
    torch.save(record, content)
    write_bytes(path, content.getvalue())


def load_checkpoint(run: Path, allow_class: str | None = None) -> tuple[Model, Checkpoint]:
    """The model of a run, in evaluation mode, and its checkpoint.

    Args:
        allow_class: the one class of another module that may be imported if the checkpoint names
            it, as ``package.module:Class``.

    Raises:
        InputError: as `read_checkpoint`, the model cannot be made of it, or it is of a class that
            is not allowed.
    """
    checkpoint = read_checkpoint(run)
    _require_allowed(run, checkpoint.config.aggregator, allow_class)
    labels = len(checkpoint.labels)
    with _reading(_path(run)):
        model = load_model(
            checkpoint.config, checkpoint.in_shape, labels, checkpoint.task, checkpoint.state
        )
    return model, checkpoint


def read_checkpoint(run: Path) -> Checkpoint:
    """The checkpoint of a run, every field checked.

    Raises:
        InputError: there is none, its bytes are damaged, it is of another version or program, or
            a field holds something else than a run records.
    """
    path = _path(run)
    if not path.is_file():
        raise InputError(
            str(run),
            expected="a run folder with checkpoint.pt",
            got="none" if run.is_dir() else "no such folder",
            remedy="give a run folder of train-agg",
        )
    require_unchanged(path)
    with _reading(path):
        require_sound_archive(path)
        record = torch.load(path, map_location="cpu", weights_only=True)
        version = record["version"]
    if type(version) is not int or version not in (WITH_BN, CHECKPOINT_VERSION):
        raise InputError(
            str(path),
            expected=f"checkpoint version {WITH_BN} or {CHECKPOINT_VERSION}",
            got=reprlib.repr(version),
            remedy="use the version of dragn-cache that wrote it, or train again",
        )
    return _parse(path, record)


def _require_allowed(run: Path, name: str, allowed: str | None) -> None:
    """Raise unless a class of one's own is allowed, and lies outside the run's folder."""
    module, colon, _ = name.partition(":")
    if not colon:
        return
    if name != allowed:
        raise InputError(
            f"{_path(run)}, config.aggregator",
            expected="an aggregator of this package, or one that `allow_class` names",
            got=name,
            remedy=f"if you trust the module {module}, give `allow_class={name}`",
        )
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)  # imports nothing
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    for place in places:
        if place is not None and Path(place).resolve().is_relative_to(run.resolve()):
            raise InputError(
                f"{_path(run)}, config.aggregator",
                expected=f"{package} outside the run's folder",
                got=place,
                remedy="move it to where your own code lies, if you trust it",
            )


def _path(run: Path) -> Path:
    return run / "checkpoint.pt"


def _reading(path: Path) -> AbstractContextManager[None]:
    """Turn the errors of bytes that torch.save did not write, and of a model whose state or options
    are not its own, into one that names the file."""
    return foreign(path, expected="a checkpoint of dragn-cache", remedy="train again")


def _wrong_field(path: Path, name: str, expected: str, got: str) -> InputError:
    return InputError(f"{path}, {name}", expected=expected, got=got, remedy="train again")


# --- fields ------------------------------------------------------------------------------------


def _parse(path: Path, record: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that a file's record describes."""
    for name, (expected, is_valid) in FIELDS.items():
        if name not in record and name not in OPTIONAL:
            raise _wrong_field(path, name, expected, "none")
        if name in record and not is_valid(record[name]):
            raise _wrong_field(path, name, expected, reprlib.repr(record[name]))
    try:
        config = TrainConfig.from_record(record["config"])
        if record["version"] == WITH_BN and config.aggregator in RECURSIVE:
            config = config.replace(options={"bn": "auto", **config.options})
    except Exception as error:  # settings of any type, for which their checks were not made
        got = str(error) if isinstance(error, InputError) else reason(error)
        raise _wrong_field(path, "config", FIELDS["config"][0], got) from error
    labels, task = tuple(record["labels"]), record["task"]
    return Checkpoint(
        config=config,
        in_shape=tuple(record["in_shape"]),
        tap=record["tap"],
        labels=labels,
        task=task,
        best_epoch=record.get("best_epoch"),
        decision=_parse_decision(path, record.get("decision", {}), len(labels), task),
        seen=record.get("seen"),
        provenance=record["provenance"],
        state=record["state"],
    )


def _parse_decision(path: Path, record: Mapping[str, Any], labels: int, task: Task) -> Decision:
    """A decision that goes with the labels and the task."""
    for name in record:
        if name not in DECISION_FIELDS:
            raise _wrong_field(path, "decision", ", ".join(DECISION_FIELDS), repr(name))
    for name, value in record.items():
        expected, is_valid = DECISION_FIELDS[name]
        if not is_valid(value, labels):
            raise _wrong_field(path, f"decision.{name}", expected, reprlib.repr(value))
    thresholds, kept = record.get("thresholds"), tuple(record.get("kept", ()))
    rule = record.get("rule", Decision.rule)
    if (rule == "thresholds") != (thresholds is not None):
        got = f"{reprlib.repr(thresholds)} for the rule {rule}"
        raise _wrong_field(path, "decision.thresholds", DECISION_FIELDS["thresholds"][0], got)
    try:
        require_rule_for(rule, task, labels)
    except InputError as error:
        raise _wrong_field(path, "decision.rule", error.expected, error.got) from error
    return Decision(rule, None if thresholds is None else tuple(thresholds), kept)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) in (1, 3) and all(map(_is_count, value))


def _is_names(value: object) -> bool:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return False
    return 0 < len(value) == len(set(value))


def _maps_to(kind: type) -> Callable[[object], bool]:
    """A test for dictionaries of such values by name."""

    def is_valid(value: object) -> bool:
        return isinstance(value, dict) and all(
            isinstance(k, str) and isinstance(v, kind) for k, v in value.items()
        )

    return is_valid


def _is_provenance(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(kind), dict) and _is_settings(value[kind])
        for kind in CHECKPOINT_DIGESTS
    )


def _is_settings(value: object) -> bool:
    """Whether all dictionaries in a value, itself included, are by name."""
    return not isinstance(value, dict) or all(
        isinstance(name, str) and _is_settings(inner) for name, inner in value.items()
    )


def _is_thresholds(value: object, labels: int) -> bool:
    if not isinstance(value, list | tuple):
        return value is None
    return len(value) == labels and all(type(x) in (int, float) and 0 <= x <= 1 for x in value)


def _is_kept(value: object, labels: int) -> bool:
    return isinstance(value, list | tuple) and all(
        type(k) is int and 0 <= k < labels for k in value
    )


# Each field of the file: what it holds, in words and as a test.
FIELDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "config": ("the settings of a training", _maps_to(object)),
    "in_shape": ("(C, h, w) or (C,), whole numbers above 0", _is_shape),
    "tap": ("the name of a tap", lambda value: isinstance(value, str)),
    "labels": ("the names of the labels, each once", _is_names),
    "task": ("multilabel or multiclass", lambda value: value in ("multilabel", "multiclass")),
    "best_epoch": ("an epoch, or None", lambda value: value is None or _is_count(value)),
    "decision": ("a rule of decision", _maps_to(object)),
    "seen": ("digests of bags by id", _maps_to(str)),
    "provenance": ("settings of features and of numerics", _is_provenance),
    "state": ("tensors by name", _maps_to(Tensor)),
}
OPTIONAL = ("best_epoch", "decision", "seen")  # earlier files lack some of them
DECISION_FIELDS: dict[str, tuple[str, Callable[[object, int], bool]]] = {
    "rule": ("the name of a rule", lambda value, labels: isinstance(value, str)),
    "thresholds": ("a threshold in [0, 1] for each label, or None without any", _is_thresholds),
    "kept": ("numbers of labels", _is_kept),
}


# --- the store of a run ------------------------------------------------------------------------


def require_same_features(run: Path, checkpoint: Checkpoint, store: Store, warn: Warn) -> None:
    """Raise unless a store's features mean what a checkpoint's did; report other numerics."""
    wrong = differences(checkpoint.provenance, store.description.provenance, ("features",))
    if wrong:
        raise StoreMismatchError(
            str(store.path),
            expected=f"the features that {run.name} was trained on",
            got=" · ".join(wrong),
            remedy="extract these images with the settings of the run's store",
        )
    other = differences(checkpoint.provenance, store.description.provenance, ("numerics",))
    if other:
        warn(f"the features were computed slightly differently: {' · '.join(other)}")
