"""Labels of which the scored bags have one class only: what their scores cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dragn_cache.types import Warn

MOST_NAMED = 5


def one_class(targets: ArrayLike) -> NDArray[np.bool_]:
    """(L,): whether the bags of targets (B, L) all have a label, or none has it."""
    y = np.asarray(targets) == 1
    single: NDArray[np.bool_] = y.all(axis=0) | ~y.any(axis=0)
    return single


def warn_one_class(targets: ArrayLike, labels: Sequence[str], who: str, warn: Warn) -> None:
    """Report labels of which the bags to score have one class only.

    Args:
        targets: (B, L) of 0 and 1.
        labels: the names of the L labels.
        who: which bags they are, as in ``test bags``.
    """
    single, count = one_class(targets), len(np.asarray(targets))
    if not count:
        return
    if single.all():
        warn(
            f"the {count} {who} have one class only of every label: AUC and mAP are undefined, "
            "accuracy and F1 tell nothing"
        )
    elif single.any():
        warn(
            f"the {count} {who} have one class only of {names_of(labels, single)}: AUC and mAP "
            "leave such labels out"
        )


def warn_one_class_tests(
    tests: Sequence[NDArray[np.int8]], labels: Sequence[str], warn: Warn
) -> None:
    """Report the same of several tests, as the folds of a cross-validation.

    Args:
        tests: of each, (B, L) of 0 and 1.
        labels: the names of the L labels.
    """
    single = np.array([one_class(targets) for targets in tests])
    nothing = int(single.all(axis=1).sum())
    never: NDArray[np.bool_] = np.asarray(single.all(axis=0))
    if nothing:
        warn(
            f"in {nothing} of {len(tests)} test folds the bags have one class only of every label: "
            "AUC and mAP are undefined there, accuracy and F1 tell nothing"
        )
    if never.any() and not never.all():
        warn(
            f"in every test fold the bags have one class only of {names_of(labels, never)}: "
            "AUC and mAP leave such labels out"
        )


def names_of(labels: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    """The names of the chosen labels, the first few of many."""
    names = [label for label, is_chosen in zip(labels, chosen, strict=True) if is_chosen]
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
