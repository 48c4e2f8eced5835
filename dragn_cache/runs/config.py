"""Settings of looking inside a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dragn_cache.options import one_of


@dataclass(frozen=True)
class ExplainConfig:
    """Settings of looking inside a run.

    Attributes:
        method: ``attention``, ``cosine``, ``leave-one-out``, or ``auto``: attention where the
            aggregator has one, else cosine where its embedding lies among the features (DRAGN,
            HAMIL), else leave-one-out.
        split: only bags that were on this side when the run was trained; None is all.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        h5: whether one .h5 per bag is written beside the table.
    """

    method: Literal["auto", "attention", "cosine", "leave-one-out"] = "auto"
    split: Literal["train", "validation", "test"] | None = None
    device: str = "cpu"
    h5: bool = True

    def __post_init__(self) -> None:
        one_of("--method", self.method, ("auto", "attention", "cosine", "leave-one-out"))
        if self.split is not None:
            one_of("--split", self.split, ("train", "validation", "test"))
