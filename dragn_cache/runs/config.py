"""Settings of looking inside a run."""

from __future__ import annotations

from typing import Literal

from dragn_cache.options import Settings, setting


class ExplainConfig(Settings):
    """Settings of looking inside a run."""

    method: Literal["auto", "attention", "cosine", "leave-one-out"] = setting(
        "auto",
        help="auto: attention, else cosine (dragn, hamil), else leave-one-out.",
    )
    split: Literal["train", "validation", "test"] | None = setting(
        None, help="Only bags that were on this side when the run was trained.", shown_default="all"
    )
    device: str = setting("cpu", help="cpu, cuda or cuda:N.")
    h5: bool = setting(True, help="Also one .h5 per bag, as CLAM names it.")
