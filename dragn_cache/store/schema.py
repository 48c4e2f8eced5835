"""The description of a store: ``store.json``, its digests, and the comparison of settings.

*features* is everything that decides what the numbers mean (backbone, weights, taps, grid,
preprocessing); *numerics* everything else that can change their last bits (dtype, device, batch
size, library versions); *plan* the manifest's images and boxes and the part limits, which decide
the parts. Labels, splits, groups, the store's format, worker counts and paths are in none of the
three. The digest *bags* is of the plan itself, the bags and their parts; *file* is of all the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dragn_cache.errors import StoreError, StoreMismatchError, foreign, reason
from dragn_cache.files import read_text, write_text
from dragn_cache.store.config import DType, Format
from dragn_cache.types import CLEAN_VIEW

SCHEMA_VERSION = 3
UNSEALED = 2
"""The version whose parts and tables have no digests but those of the bags' features."""
KINDS = ("features", "numerics", "plan")
MOST_VALUES = 2**31
"""Of one row: no array can be asked for that is larger by far."""
_RESTORE = "restore the file, or extract into a new store"


@dataclass(frozen=True)
class Tap:
    """One stored output: its name, the shape of one row (``(C,)`` or ``(C, h, w)``), its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class StoreDescription:
    """The contents of ``store.json``.

    Attributes:
        taps: in the order in which bag digests take them.
        views: names of the stored views; "0" is clean.
        provenance: for each of `KINDS`, the values that went into its digest.
        made_from: names, for people, of what a digest only identifies (data set, weights).
        revision: how often an update has changed the plan.
        bags: `plan.bags_digest` of manifest/bags.csv, as hex; "" before it is planned.
    """

    format: Format
    taps: tuple[Tap, ...]
    provenance: Mapping[str, Mapping[str, Any]]
    views: tuple[str, ...] = (CLEAN_VIEW,)
    made_from: Mapping[str, str] = field(default_factory=dict)
    revision: int = 0
    bags: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        # It is compared with provenance that was read from JSON, where tuples are lists.
        object.__setattr__(self, "provenance", json.loads(json.dumps(dict(self.provenance))))

    @property
    def row_bytes(self) -> int:
        """Bytes of one instance over all taps and views."""
        return sum(tap.row_bytes for tap in self.taps) * len(self.views)

    @property
    def is_sealed(self) -> bool:
        """Whether everything in the store is under a digest; older versions have fewer."""
        return self.schema_version > UNSEALED

    def digest(self, kind: str) -> str:
        """sha256 of one kind of provenance, as hex."""
        return json_digest(self.provenance[kind])

    def to_json(self) -> str:
        record = asdict(self)
        bags = record.pop("bags")
        record["digests"] = {kind: self.digest(kind) for kind in KINDS}
        if self.is_sealed:
            record["digests"]["bags"] = bags
            record["digests"]["file"] = json_digest(record)
        return json.dumps(record, indent=2, sort_keys=True) + "\n"


def is_step(name: object) -> bool:
    """Whether a name of a tap or a view is one step of a path, below the one before it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {*"/\\\0"}


def json_digest(value: object) -> str:
    """sha256 (hex) of a value's canonical JSON: sorted keys, no spaces, UTF-8."""
    # Equal values give equal texts, whatever the order in which their keys were set.
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_description(store: Path) -> StoreDescription:
    """Read and check ``store.json``.

    Raises:
        StoreError: there is none, it is not readable, or another version wrote it.
    """
    path = store / "store.json"
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        got = "no store.json in it" if store.is_dir() else "a file"
        got = got if store.exists() else "no such folder"
        raise StoreError(
            str(store),
            expected="a feature store",
            got=got,
            remedy="correct the path, or make one with dragn-cache extract",
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, reason(error)) from error
    return parse_description(text, path)


def parse_description(text: str, path: Path) -> StoreDescription:
    """The description that the text of a ``store.json`` gives; ``path`` is for messages."""
    with foreign(path, expected="what dragn-cache wrote", remedy=_RESTORE, kind=StoreError):
        record = json.loads(text)
        version = record["schema_version"]
        if version not in (UNSEALED, SCHEMA_VERSION):
            raise StoreError(
                str(path),
                expected=f"schema version {UNSEALED} or {SCHEMA_VERSION}",
                got=str(version),
                remedy="use the version of dragn-cache that wrote it, or extract again",
            )
        taps = tuple(Tap(t["name"], tuple(t["shape"]), t["dtype"]) for t in record["taps"])
        _require_types(record, taps)
        description = StoreDescription(
            record["format"],
            taps,
            record["provenance"],
            tuple(record["views"]),
            record["made_from"],
            record["revision"],
            record["digests"]["bags"] if version > UNSEALED else "",
            version,
        )
        # All that was read gives the text anew; keys that no version has, and other digests, not.
        recorded, actual = record, json.loads(description.to_json())
    if recorded != actual:
        wrong = [name for name in actual if recorded.get(name) != actual[name]]
        got = "settings that do not give their digests" if wrong else "keys of no version"
        raise _damaged(path, got)
    return description


def _damaged(path: Path, got: str) -> StoreError:
    return StoreError(
        str(path),
        expected="what dragn-cache wrote",
        got=got,
        remedy=_RESTORE,
    )


def _require_types(record: Mapping[str, Any], taps: Sequence[Tap]) -> None:
    """Raise TypeError for a field that no store of this version has."""
    sizes = [size for tap in taps for size in tap.shape]
    views, made_from, provenance = (record[k] for k in ("views", "made_from", "provenance"))
    sound = {
        "format": record["format"] in get_args(Format),
        "taps": len(taps) > 0
        and all(is_step(tap.name) and tap.dtype in get_args(DType) for tap in taps)
        and len({tap.name for tap in taps}) == len(taps)
        and all(type(size) is int and size > 0 for size in sizes)
        and all(math.prod(tap.shape) <= MOST_VALUES for tap in taps),
        "views": isinstance(views, list)
        and len(views) > 0
        and all(map(is_step, views))
        and len(set(views)) == len(views),
        "made_from": isinstance(made_from, dict)
        and all(isinstance(name, str) for name in made_from.values()),
        "provenance": isinstance(provenance, dict)
        and all(isinstance(provenance.get(kind), dict) for kind in KINDS),
        "revision": type(record["revision"]) is int and record["revision"] >= 0,
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise TypeError(f"a field {name} that is not of this version")


def write_description(description: StoreDescription, store: Path) -> None:
    """Write ``store.json`` atomically."""
    write_text(store / "store.json", description.to_json())


def differences(
    have: Mapping[str, Mapping[str, Any]],
    want: Mapping[str, Mapping[str, Any]],
    kinds: Sequence[str] = KINDS,
) -> list[str]:
    """Differences between two provenances, one text for each setting."""
    texts = []
    for kind in kinds:
        old, new = _flat(have[kind]), _flat(want[kind])
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                texts.append(
                    f"{kind}.{key} is {_short(old.get(key))}, asked for {_short(new.get(key))}"
                )
    return texts


def require_same_settings(store: Path, have: StoreDescription, want: StoreDescription) -> None:
    """Raise `StoreMismatchError` naming every setting in which a store is not as asked for."""
    texts = differences(have.provenance, want.provenance)
    if have.format != want.format:
        texts.insert(0, f"format is {have.format}, asked for {want.format}")
    elif (have.taps, have.views) != (want.taps, want.views):
        texts.append("store.json's taps or views are not those of its own settings")
    if texts:
        remedy = "give the store's settings, or another `out`"
        if all(text.startswith("plan.") for text in texts):
            remedy = "extract with `update=True` to bring it up to date, or give another `out`"
            if want.provenance["numerics"].get("imported"):
                remedy = "the sources have changed: import them with another `out`"
        raise StoreMismatchError(
            str(store),
            expected="a store of the same settings",
            got=" · ".join(texts),
            remedy=remedy,
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat


def _short(value: object) -> str:
    text = "absent" if value is None else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:18] + "…" + text[-6:]
