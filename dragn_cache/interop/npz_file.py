"""One ``.npz`` of pooled rows.

``features (N, D)``, ``offsets (B+1)``, ``bag_ids (B,)``; also ``targets (B, L)``, ``labels (L,)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dragn_cache.errors import InputError
from dragn_cache.files import require_sound_archive
from dragn_cache.interop.source import (
    TAP,
    BagFeatures,
    MadeBy,
    Source,
    file_digest,
    make_records,
    reading,
)
from dragn_cache.manifest import Bag, Manifest
from dragn_cache.manifest.reading import infer_task
from dragn_cache.store.part import Array
from dragn_cache.types import CLEAN_VIEW


class NpzSource(Source):
    """Pooled rows and offsets. The file is read whole: an npz cannot be read in pieces."""

    layout = "npz"

    def __init__(self, path: Path) -> None:
        self.path = path
        what = "an npz with features, offsets and bag_ids"
        with reading(path, what):
            require_sound_archive(path)
        # np.load does not close a file that it opened itself if that is no npz.
        with reading(path, what), path.open("rb") as file, np.load(file) as arrays:
            self._features, self._offsets = arrays["features"], arrays["offsets"]
            self.ids = arrays["bag_ids"].astype(str).tolist()
            targets = arrays.get("targets")
            labels = arrays["labels"].astype(str).tolist() if "labels" in arrays else None
        self._require_offsets()
        self.manifest = self._label(targets, labels)
        self._position = {bag_id: k for k, bag_id in enumerate(self.ids)}
        self._digest = file_digest(path)

    def read(self, bag_id: str) -> BagFeatures:
        k = self._position[bag_id]
        values = self._features[int(self._offsets[k]) : int(self._offsets[k + 1])]
        records = make_records(len(values), self.path.name, self._digest)
        return BagFeatures(
            str(self.path), {(TAP, CLEAN_VIEW): values}, records, self._digest, MadeBy()
        )

    def _require_offsets(self) -> None:
        offsets, count = self._offsets, len(self.ids)
        sound = offsets.shape == (count + 1,) and offsets.dtype.kind in "iu"
        if not sound or offsets[0] != 0 or (np.diff(offsets.astype(np.int64)) < 0).any():
            sound = False
        if not sound or offsets[-1] != len(self._features) or len(set(self.ids)) != count:
            self._fail(
                f"{count} distinct bag_ids, and offsets that run from 0 to {len(self._features)}",
                f"{len(set(self.ids))} bag_ids, offsets {offsets.shape} {_ends(offsets)}",
            )

    def _label(self, targets: Array | None, labels: list[str] | None) -> Manifest:
        bags = [Bag(bag_id) for bag_id in self.ids]
        names: tuple[str, ...] = ()
        if targets is not None:
            width = targets.shape[1] if targets.ndim == 2 else -1
            names = tuple(labels if labels is not None else map(str, range(width)))
            if targets.shape != (len(bags), len(set(names))) or not np.isin(targets, (0, 1)).all():
                self._fail(
                    f"targets of 0 and 1, {len(bags)} × {len(names)}, and distinct labels",
                    f"{targets.dtype} {targets.shape} and labels {', '.join(names)}",
                )
            rows = [tuple(names[k] for k in np.flatnonzero(row)) for row in targets]
            bags = [Bag(bag.bag_id, row) for bag, row in zip(bags, rows, strict=True)]
        return Manifest(self.path.stem, infer_task(bags), names, tuple(bags), {}, Path())

    def _fail(self, expected: str, got: str) -> None:
        raise InputError(str(self.path), expected=expected, got=got, remedy="make the file again")


def _ends(offsets: Any) -> str:
    return f"from {offsets.flat[0]} to {offsets.flat[-1]}" if offsets.size else "of no entry"
