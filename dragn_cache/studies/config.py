"""Settings of a cross-validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dragn_cache.errors import InputError
from dragn_cache.old_options import at_least, one_of
from dragn_cache.training.config import TrainConfig


@dataclass(frozen=True)
class CrossvalConfig:
    """Settings of a cross-validation.

    Attributes:
        train: of every training; its aggregator, options and seed are replaced.
        aggregators: name and options of each method.
        folds: one is for testing, the next for validation, the rest for training.
        seeds: how many times all bags are divided into folds.
        jobs: trainings at the same time; None is one for each core, or one on a GPU.
    """

    train: TrainConfig
    aggregators: tuple[tuple[str, Mapping[str, Any]], ...]
    folds: int = 10
    seeds: int = 5
    jobs: int | None = None

    def __post_init__(self) -> None:
        at_least("--folds", self.folds, 3)
        at_least("--seeds", self.seeds, 1)
        if self.jobs is not None:
            at_least("--jobs", self.jobs, 1)
        one_of("--views", self.train.views, ("off",))
        labels = [replace(self.train, aggregator=a, options=o).label for a, o in self.aggregators]
        twice = [label for k, label in enumerate(labels) if label in labels[:k]]
        if twice or not labels:
            raise InputError(
                "--aggregator",
                expected="each aggregator once" if twice else "at least one aggregator",
                got=f"{twice[0]} twice" if twice else "none",
                remedy="leave it out once" if twice else "give --aggregator abmil,mean, say",
            )

    @property
    def methods(self) -> dict[str, TrainConfig]:
        """The settings of each method's trainings, by its label."""
        configs = [replace(self.train, aggregator=a, options=o) for a, o in self.aggregators]
        return {config.label: config for config in configs}
