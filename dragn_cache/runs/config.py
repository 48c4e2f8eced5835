"""Settings of what is done with a trained run: predicting, evaluating, looking inside."""

from __future__ import annotations

from typing import Literal

from dragn_cache.options import Settings, setting

Split = Literal["train", "validation", "test", "all"]


class PredictConfig(Settings):
    """Settings of every use of a run."""

    device: str = setting("cpu", help="cpu, cuda or cuda:N.")


class EvaluateConfig(PredictConfig):
    """Settings of an evaluation of a run."""

    split: Split | None = setting(
        None,
        help="The run's own bags of this split, or all of them.",
        shown_default="test; with a store: bags that are new to the run",
    )
    decision: str | None = setting(
        None,
        help="default, half, thresholds or top-K; thresholds that the run does not have are chosen "
        "on its validation bags.",
        shown_default="the run's",
    )


class ExplainConfig(PredictConfig):
    """Settings of looking inside a run."""

    method: Literal["auto", "attention", "cosine", "leave-one-out"] = setting(
        "auto",
        help="auto: attention, else cosine (dragn, hamil), else leave-one-out.",
    )
    split: Literal["train", "validation", "test"] | None = setting(
        None, help="Only bags that were on this side when the run was trained.", shown_default="all"
    )
    h5: bool = setting(True, help="Also one .h5 per bag, as CLAM names it.")
