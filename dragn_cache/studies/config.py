"""Settings of a cross-validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dragn_cache.errors import SettingError
from dragn_cache.options import Settings, setting
from dragn_cache.training.config import TrainConfig


class DivisionConfig(Settings):
    """How bags are divided into folds, and how many trainings work at them."""

    folds: int = setting(10, ge=3, help="Folds; the next one is for validation.")
    seeds: int = setting(5, ge=1, help="Divisions into folds.")
    jobs: int | None = setting(
        None, ge=1, help="Trainings at a time.", shown_default="one a core, one on a GPU"
    )


class CrossvalConfig(DivisionConfig):
    """Settings of a cross-validation.

    Every method of ``aggregators`` is trained with ``train``, whose aggregator, options and seed
    are replaced.
    """

    train: TrainConfig = setting(help="Settings of every training.")
    aggregators: tuple[tuple[str, Mapping[str, Any]], ...] = setting(
        help="Name and options of each method."
    )

    def require_consistent(self) -> None:
        if self.train.views != "off":
            raise SettingError(
                "train.views",
                expected="off",
                got=repr(self.train.views),
                remedy="leave it out: cross-validation trains on clean views",
            )
        labels = [config.label for config in self._configs()]
        twice = [label for k, label in enumerate(labels) if label in labels[:k]]
        if twice or not labels:
            raise SettingError(
                "aggregators",
                expected="each aggregator once" if twice else "at least one aggregator",
                got=f"{twice[0]} twice" if twice else "none",
                remedy="leave it out once" if twice else "give abmil and mean, say",
            )

    def _configs(self) -> list[TrainConfig]:
        return [self.train.replace(aggregator=a, options=o) for a, o in self.aggregators]

    @property
    def methods(self) -> dict[str, TrainConfig]:
        """The settings of each method's trainings, by its label."""
        return {config.label: config for config in self._configs()}
