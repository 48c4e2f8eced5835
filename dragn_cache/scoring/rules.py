"""Names of the rules by which probabilities become label sets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dragn_cache.errors import SettingError

if TYPE_CHECKING:  # settings are made without NumPy, which that loads
    from dragn_cache.types import Task

RULES = "default, half, thresholds or top-K, as top-2"


def require_rule(rule: str) -> None:
    """Raise a `SettingError` unless ``rule`` is the name of a rule."""
    if rule not in ("default", "half", "thresholds") and top_count(rule) is None:
        raise SettingError("decision", expected=RULES, got=repr(rule), remedy="choose one of these")


def require_rule_for(rule: str, task: Task, labels: int) -> None:
    """Raise a `SettingError` unless a rule can decide between ``labels`` labels of a task."""
    require_rule(rule)
    if task == "multiclass" and rule != "default":
        raise SettingError(
            "decision",
            expected="default for a multi-class task, where each bag has one class",
            got=repr(rule),
            remedy="leave it out",
        )
    count = top_count(rule)
    if count is not None and count > labels:
        raise SettingError(
            "decision",
            expected=f"at most top-{labels} of {labels} labels",
            got=repr(rule),
            remedy="give a smaller number",
        )


def top_count(rule: str) -> int | None:
    """K of ``top-K``, None for other rules."""
    found = re.fullmatch(r"top-([1-9]\d{0,8})", rule)
    return int(found[1]) if found else None
