"""Settings of using a run: predicting, scoring, looking inside."""

from __future__ import annotations

from typing import Literal

from dragn_cache.errors import SettingError
from dragn_cache.options import Settings, setting
from dragn_cache.scoring.rules import RULES, require_rule
from dragn_cache.training.config import device_setting

Split = Literal["train", "validation", "test", "all"]


def _require_class_name(name: str) -> None:
    module, _, attribute = name.partition(":")
    if not all(word.isidentifier() for word in [*module.split("."), attribute]):
        raise SettingError(
            "allow_class", expected="package.module:Class", got=repr(name), remedy="correct it"
        )


class ApplyConfig(Settings):
    """Settings of applying a run's model.

    A checkpoint is only data: a class that it names, other than this package's, is imported only if
    ``allow_class`` names it too, and never from the run's folder.
    """

    device: str = device_setting()
    allow_class: str | None = setting(
        None,
        help="Aggregator of your own that the run may name: its module is imported.",
        metavar="MODULE:CLASS",
        check=_require_class_name,
    )


class EvaluateConfig(ApplyConfig):
    """Settings of scoring a run.

    Thresholds that the run does not have are chosen on its validation bags.
    """

    split: Split | None = setting(
        None,
        help="The run's own bags of this split.",
        shown_default="test; with a store: new bags",
    )
    decision: str | None = setting(
        None,
        help=f"{RULES}.",
        shown_default="the run's",
        check=require_rule,
    )


class ExplainConfig(ApplyConfig):
    """Settings of looking inside a run."""

    method: Literal["auto", "attention", "cosine", "leave-one-out"] = setting(
        "auto",
        help="auto: attention, else cosine (dragn, hamil), else leave-one-out.",
    )
    split: Literal["train", "validation", "test"] | None = setting(
        None, help="Only bags that were on this side when the run was trained.", shown_default="all"
    )
    h5: bool = setting(True, help="Also one .h5 per bag, as CLAM names it.")
