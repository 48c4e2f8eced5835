"""A run's checkpoint: written, read, and refused for other features."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dragn_cache.errors import InputError, StoreMismatchError
from dragn_cache.files import write_bytes
from dragn_cache.loading.labelling import Labelling
from dragn_cache.scoring.decisions import Decision
from dragn_cache.store import Store, differences
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.fit import Fitted, Model, load_model
from dragn_cache.types import Warn

CHECKPOINT_VERSION = 1
CHECKPOINT_DIGESTS = ("features", "numerics")  # of a store's provenance
# What zipfile and torch.load raise on bytes that torch.save did not write.
CHECKPOINT_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
)


def write_checkpoint(
    path: Path,
    trained: Fitted,
    config: TrainConfig,
    labelling: Labelling,
    store: Store,
    decision: Decision,
    seen: dict[str, str],
) -> None:
    tap = store.tap(config.tap)
    record = {
        "version": CHECKPOINT_VERSION,
        "config": asdict(config),
        "in_shape": list(tap.shape),
        "tap": tap.name,
        "labels": list(labelling.labels),
        "task": labelling.task,
        "best_epoch": trained.best_epoch,
        "decision": asdict(decision),
        "seen": seen,
        "provenance": {k: store.description.provenance[k] for k in CHECKPOINT_DIGESTS},
        "state": trained.model.state_dict(),
    }
    content = io.BytesIO()
    torch.save(record, content)
    write_bytes(path, content.getvalue())


def load_checkpoint(run: Path) -> tuple[Model, dict[str, Any]]:
    """The model of a run, in evaluation mode, and everything its checkpoint records."""
    path = run / "checkpoint.pt"
    if not path.is_file():
        raise InputError(
            str(run),
            expected="a run folder with checkpoint.pt",
            got="none" if run.is_dir() else "no such folder",
            remedy="give the folder that train-agg has written",
        )
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not compare the checksums
            damaged = file.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"other bytes than were written in {damaged}")
        record = torch.load(path, map_location="cpu", weights_only=True)
        if record["version"] != CHECKPOINT_VERSION:
            raise InputError(
                str(path),
                expected=f"checkpoint version {CHECKPOINT_VERSION}",
                got=str(record["version"]),
                remedy="use the version of dragn-cache that wrote it, or train again",
            )
        config = TrainConfig(**record["config"])
        shape, labels = tuple(record["in_shape"]), len(record["labels"])
        _ = (record["tap"], *(record["provenance"][kind] for kind in CHECKPOINT_DIGESTS))
        model = load_model(config, shape, labels, record["task"], record["state"])
    except CHECKPOINT_DAMAGE as error:
        got = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            str(path), expected="a checkpoint of dragn-cache", got=got, remedy="train again"
        ) from error
    return model, record


def decision_of(record: dict[str, Any]) -> Decision:
    """How a run decides, by its checkpoint; those of before there was a choice have the default."""
    return Decision(**record.get("decision", {}))


def require_same_features(run: Path, record: dict[str, Any], store: Store, warn: Warn) -> None:
    """Raise unless a store's features mean what a checkpoint's did; report other numerics."""
    wrong = differences(record["provenance"], store.description.provenance, ("features",))
    if wrong:
        raise StoreMismatchError(
            str(store.path),
            expected=f"the features that {run.name} was trained on",
            got=" · ".join(wrong),
            remedy="extract these images with the settings of the run's store",
        )
    other = differences(record["provenance"], store.description.provenance, ("numerics",))
    if other:
        warn(f"the features were computed slightly differently: {' · '.join(other)}")
