"""Checks of the arrays that scores are computed from."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dragn_cache.errors import InputError
from dragn_cache.types import Floats, Task


def require_probabilities(probabilities: ArrayLike) -> Floats:
    """(B, L) float64; raises `InputError` unless all are in [0, 1]."""
    p = np.asarray(probabilities)
    if p.ndim != 2 or p.shape[1] < 1 or p.dtype.kind not in "buif":
        raise InputError(
            "probabilities",
            expected="numbers of shape (bags, labels), with at least one label",
            got=f"{p.dtype} of shape {p.shape}",
            remedy="give one row per bag and one column per label",
        )
    wrong = ~((p >= 0) & (p <= 1))  # also true for NaN
    if wrong.any():
        bag, label = np.argwhere(wrong)[0]
        raise InputError(
            f"probabilities, bag {bag}, label {label}",
            expected="a probability in [0, 1]",
            got=str(p[bag, label]),
            remedy="give probabilities, not logits; if NaN, the training diverged",
        )
    return p.astype(np.float64)


def require_targets(targets: ArrayLike, shape: tuple[int, ...], task: Task) -> Floats:
    """(B, L) float64 of 0 and 1; raises `InputError` for others, or another shape than given."""
    y = np.asarray(targets)
    if y.shape != shape or y.dtype.kind not in "buif":
        raise InputError(
            "targets",
            expected=f"numbers of the probabilities' shape {shape}",
            got=f"{y.dtype} of shape {y.shape}",
            remedy="give one row per bag and one column per label in both",
        )
    wrong = (y != 0) & (y != 1)
    if wrong.any():
        bag, label = np.argwhere(wrong)[0]
        raise InputError(
            f"targets, bag {bag}, label {label}",
            expected="0 or 1",
            got=str(y[bag, label]),
            remedy="encode each label as 0 or 1 (classes as one-hot rows)",
        )
    y = y.astype(np.float64)
    not_one = np.flatnonzero(y.sum(axis=1) != 1)
    if task == "multiclass" and len(not_one):
        bag = not_one[0]
        raise InputError(
            f"targets, bag {bag}",
            expected="exactly one class",
            got=f"{int(y[bag].sum())} classes",
            remedy="give one-hot rows, or use the task multilabel",
        )
    return y
