"""Settings of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dragn_cache.errors import InputError
from dragn_cache.machine import parse_memory
from dragn_cache.old_options import at_least, one_of, within
from dragn_cache.scoring.decisions import require_rule


@dataclass(frozen=True)
class TrainConfig:
    """Settings of stage two's training.

    Attributes:
        aggregator: name of an aggregator.
        options: its options, for example ``{"unit": "L3Agg"}``.
        tap: tap to train on; None is a map for methods that need maps, else a vector.
        epochs: passes over the training bags.
        batch_size: bags in a step.
        loss: name of a loss, or ``auto``: binary cross-entropy for multi-label tasks,
            cross-entropy for multi-class ones.
        loss_options: its options, for example ``{"gamma": 1.5}``.
        optimizer: ``adamw`` (weight decay decoupled from the gradient), ``adam`` or ``sgd``.
        lr, weight_decay: the optimiser's learning rate and weight decay.
        momentum: of ``sgd``.
        schedule: how the learning rate goes on: ``none``, ``plateau``, ``cosine`` or ``step``.
        schedule_options: its options, for example ``{"patience": 5}``.
        keep: the epoch whose weights are kept: the ``best``, of lowest validation loss, or the
            ``last``, for published protocols of a fixed length and validation sets too small to
            choose.
        patience: training ends after that many epochs without a lower validation loss; 0: never.
        dropout: on the bag's embedding, before the head.
        pos_weight: how much a positive target counts in a multi-label loss: a number, or
            ``balanced``, each label's (N - n) / n where n of the N training bags have it. None is
            1, but ``balanced`` for the losses ``weighted_bce`` and ``frn``.
        stage_mask: where labels that a bag's stage cannot have are masked: in ``train`` they count
            nothing in losses, in ``predict`` their probability is 0, in ``both`` both; None: never.
        stages: for the mask, labels to the stages in which alone they exist.
        scale: ``standard`` standardises each channel by the training instances' moments.
        order: order of instances in training; evaluation always uses the manifest's.
        views: ``random`` draws one of the store's views for every training instance and epoch,
            ``all`` shows every training bag once in each view; evaluation is always on clean ones.
        seed: of the split, the initialisation, dropout, and all that ``shuffle_seed`` is of.
        shuffle_seed: of the order of bags and instances, and their views; None is ``seed``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        memory: what features may fill, as ``8GB``; ``auto`` is 60 % of what is free. Larger ones
            are streamed from the store in shuffled blocks.
        intervals: bootstrap resamples behind each 95 % interval; 0 leaves them out.
        decision: rule by which probabilities become label sets, see `Decision`.
    """

    aggregator: str = "dragn"
    options: Mapping[str, Any] | None = None
    tap: str | None = None
    epochs: int = 60
    batch_size: int = 16
    loss: str = "auto"
    loss_options: Mapping[str, Any] | None = None
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 3e-4
    weight_decay: float = 1e-2
    momentum: float = 0.9
    schedule: Literal["none", "plateau", "cosine", "step"] = "none"
    schedule_options: Mapping[str, Any] | None = None
    keep: Literal["best", "last"] = "best"
    patience: int = 0
    dropout: float = 0.5
    pos_weight: float | Literal["balanced"] | None = None
    stage_mask: Literal["train", "predict", "both"] | None = None
    stages: Mapping[str, Sequence[str]] | None = None
    scale: Literal["none", "standard"] = "none"
    order: Literal["random", "manifest"] = "random"
    views: Literal["off", "random", "all"] = "off"
    seed: int = 0
    shuffle_seed: int | None = None
    device: str = "cpu"
    memory: str = "auto"
    intervals: int = 1000
    decision: str = "default"

    def __post_init__(self) -> None:
        one_of("--scale", self.scale, ("none", "standard"))
        one_of("--order", self.order, ("random", "manifest"))
        one_of("--views", self.views, ("off", "random", "all"))
        one_of("--optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        one_of("--schedule", self.schedule, ("none", "plateau", "cosine", "step"))
        at_least("--epochs", self.epochs, 1)
        at_least("--batch-size", self.batch_size, 1)
        at_least("--patience", self.patience, 0)
        one_of("--keep", self.keep, ("best", "last"))
        if self.keep == "last" and self.patience:
            raise InputError(
                "--keep last",
                expected="training that does not stop early",
                got=f"--patience {self.patience}",
                remedy="leave one of them out",
            )
        at_least("--intervals", self.intervals, 0)
        parse_memory(self.memory)
        require_rule(self.decision)
        at_least("--seed", self.seed, 0)
        at_least("--shuffle-seed", self.order_seed, 0)
        weight = 1.0 if self.pos_weight in (None, "balanced") else self.pos_weight
        if not isinstance(weight, float | int):
            raise InputError(
                "--pos-weight",
                expected="a number or balanced",
                got=repr(self.pos_weight),
                remedy="change it",
            )
        self._require_stages()
        within("--pos-weight", weight, 0.0, 1e6)
        within("--lr", self.lr, 0.0, 1e3)
        within("--weight-decay", self.weight_decay, 0.0, 1e3)
        within("--momentum", self.momentum, 0.0, 0.999)
        if self.optimizer != "sgd" and self.momentum != type(self).momentum:
            raise InputError(
                "--momentum",
                expected="--optimizer sgd, which alone reads it",
                got=self.optimizer,
                remedy="leave it out, or choose sgd",
            )
        within("--dropout", self.dropout, 0.0, 0.999)

    def _require_stages(self) -> None:
        if self.stage_mask is not None:
            one_of("--stage-mask", self.stage_mask, ("train", "predict", "both"))
        if (self.stage_mask is None) != (self.stages is None):
            given, absent = ("--stage-mask", "--stage-table")[:: -1 if self.stages else 1]
            raise InputError(
                given, expected=f"{absent} as well", got="none", remedy="give both or neither"
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
        for option, value in (self.options or {}).items():
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            options.append(text if option == "unit" else f"{option}={text}")
        return "-".join([self.aggregator.replace(":", "."), *options])
