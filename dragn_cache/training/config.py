"""Settings of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Le

from dragn_cache.errors import SettingError
from dragn_cache.machine import parse_memory
from dragn_cache.options import MAX_SEED, Settings, declarations, setting
from dragn_cache.scoring.rules import RULES, require_rule
from dragn_cache.training.losses import LOSSES

OPTIONS = ("options", "loss_options", "schedule_options")


def device_setting() -> Any:
    """The setting of all that computes on a device."""
    return setting("cpu", help="cpu, cuda or cuda:N.")


def _read_stages(text: str) -> Mapping[str, Sequence[str]]:
    from dragn_cache.loading.label_masks import read_stage_table  # here: it loads NumPy

    return read_stage_table(Path(text))


class TrainConfig(Settings):
    """Settings of stage two's training.

    - ``loss`` auto is binary cross-entropy for multi-label tasks, else cross-entropy.
    - ``keep`` last is for published protocols of a fixed length, and for validation sets too small
      to choose by.
    - ``pos_weight`` is how much a positive target counts in a multi-label loss; balanced is each
      label's (N - n) / n where n of the N training bags have it. None is 1, but balanced for the
      losses weighted_bce and frn.
    - ``stage_mask``: labels that a bag's stage cannot have count nothing in losses (train), have
      the probability 0 (predict), or both. ``stages`` has the stages in which alone a label exists.
    - ``order`` and ``views`` are of training; all else takes the manifest's order and clean views.
    """

    aggregator: str = setting("dragn", help="A name; see aggregators.", sweep=True)
    options: Mapping[str, Any] = setting(
        {},
        help="An aggregator's option; may be repeated.",
        flag="option",
        options_of="aggregator",
        sweep=True,
    )
    tap: str | None = setting(None, help="Tap to train on.", shown_default="map or vector")
    epochs: int = setting(60, ge=1, help="Passes over the training bags.", sweep=True)
    batch_size: int = setting(16, ge=1, help="Bags of a step.", sweep=True)
    loss: str = setting(
        "auto",
        help=f"auto, {', '.join([*LOSSES][:-1])} or {[*LOSSES][-1]}.",
        sweep=True,
    )
    loss_options: Mapping[str, Any] = setting(
        {},
        help="A loss's option; may be repeated.",
        flag="loss-option",
        options_of="loss",
        sweep=True,
    )
    optimizer: Literal["adamw", "adam", "sgd"] = setting(
        "adamw", help="Rule of the steps; adamw decays weights apart from the gradient.", sweep=True
    )
    lr: float = setting(3e-4, ge=0, le=1000, help="Learning rate.", sweep=True)
    weight_decay: float = setting(1e-2, ge=0, le=1000, help="Weight decay.", sweep=True)
    momentum: float = setting(0.9, ge=0, le=0.999, help="Momentum of sgd.", sweep=True)
    schedule: Literal["none", "plateau", "cosine", "step"] = setting(
        "none", help="Course of the learning rate.", sweep=True
    )
    schedule_options: Mapping[str, Any] = setting(
        {},
        help="A schedule's option; may be repeated.",
        flag="schedule-option",
        options_of="schedule",
        sweep=True,
    )
    keep: Literal["best", "last"] = setting(
        "best",
        help="The epoch that is kept: of lowest validation loss, or the last.",
        sweep=True,
    )
    patience: int = setting(
        0, ge=0, help="Stop after that many epochs without improvement; 0: never.", sweep=True
    )
    dropout: float = setting(0.5, ge=0, le=0.999, help="Dropout before the head.", sweep=True)
    pos_weight: Annotated[float, Ge(0), Le(1e6)] | Literal["balanced"] | None = setting(
        None, help="Weight of positive targets: a number, or balanced.", sweep=True
    )
    stage_mask: Literal["train", "predict", "both"] | None = setting(
        None,
        help="Where labels that a bag's stage cannot have are masked.",
        shown_default="nowhere",
    )
    stages: Mapping[str, Sequence[str]] | None = setting(
        None,
        help="CSV of label,stages for the stage mask.",
        flag="stage-table",
        metavar="FILE",
        parse=_read_stages,
    )
    scale: Literal["none", "standard"] = setting(
        "none", help="Standardise each channel by the training instances.", sweep=True
    )
    order: Literal["random", "manifest"] = setting(
        "random", help="Order of instances in training.", sweep=True
    )
    views: Literal["off", "random", "all"] = setting(
        "off", help="The store's augmented views in training: one drawn anew each time, or all."
    )
    seed: int = setting(
        0, ge=0, le=MAX_SEED, help="Of split, initialisation, dropout, order and views."
    )
    shuffle_seed: int | None = setting(
        None, ge=0, le=MAX_SEED, help="Of order and views alone.", shown_default="the seed"
    )
    device: str = device_setting()
    memory: str = setting(
        "auto", help="What features may fill, as 8GB; larger ones are streamed.", check=parse_memory
    )
    intervals: int = setting(1000, ge=0, help="Resamples for the intervals; 0: none.")
    decision: str = setting(
        "default",
        help=f"What counts as yes: {RULES}.",
        check=require_rule,
    )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The settings that a checkpoint records; older ones have None where no option is given."""
        none: dict[str, Any] = {name: {} for name in OPTIONS if record.get(name, {}) is None}
        return cls(**{**record, **none})

    def require_consistent(self) -> None:
        if self.keep == "last" and self.patience:
            raise SettingError(
                "patience",
                expected="0 with `keep=last`: training that does not stop early",
                got=str(self.patience),
                remedy="leave one of them out",
            )
        if (
            self.optimizer != "sgd"
            and self.momentum != declarations(type(self))["momentum"].default
        ):
            raise SettingError(
                "momentum",
                expected="`optimizer=sgd`, which alone reads it",
                got=self.optimizer,
                remedy="leave it out, or choose sgd",
            )
        if (self.stage_mask is None) != (self.stages is None):
            given, absent = ("stage_mask", "stages")[:: -1 if self.stages else 1]
            raise SettingError(
                given, expected=f"`{absent}` as well", got="none", remedy="give both or neither"
            )

    @property
    def masks_training(self) -> bool:
        """Whether labels that a bag's stage cannot have count nothing in losses."""
        return self.stage_mask in ("train", "both")

    @property
    def masks_predictions(self) -> bool:
        """Whether the probability of labels that a bag's stage cannot have is 0."""
        return self.stage_mask in ("predict", "both")

    @property
    def order_seed(self) -> int:
        """Seed of the order of bags and instances, and of their views."""
        return self.seed if self.shuffle_seed is None else self.shuffle_seed

    @property
    def label(self) -> str:
        """The method and its options as a short name: ``dragn-L3Agg``."""
        options = []
        for option, value in self.options.items():
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            options.append(text if option == "unit" else f"{option}={text}")
        return "-".join([self.aggregator.replace(":", "."), *options])
