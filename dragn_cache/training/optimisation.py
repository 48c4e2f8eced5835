"""How training steps: PyTorch's optimisers by name, and how their learning rate goes on.

A schedule is told after every epoch how validation went and sets the rate of the next one; the
schedulers are PyTorch's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau

from dragn_cache.errors import InputError
from dragn_cache.old_options import check_number, check_whole, choose
from dragn_cache.scoring.scores import BY_NAME
from dragn_cache.training.config import TrainConfig

Monitor = Literal["loss", "f1_macro"]  # besides the loss, names of scores
EpochEnd = Callable[[float], None]
"""Called after every epoch with the validation score that the schedule monitors."""


def create_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """``config.optimizer`` on some parameters.

    ``adamw`` decouples weight decay from the gradient; ``adam`` and ``sgd`` add it there.
    """
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return SGD(parameters, lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "adam":
        return Adam(parameters, lr, weight_decay=decay)
    return AdamW(parameters, lr, weight_decay=decay)


@dataclass(frozen=True)
class Schedule(ABC):
    """How the learning rate goes. The fields of a subclass are its options."""

    @property
    def monitors(self) -> Monitor:
        """The validation score that it wants to be told."""
        return "loss"

    @abstractmethod
    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        """Begin a training of ``epochs`` epochs."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The rate stays."""

    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        return lambda score: None


@dataclass(frozen=True)
class Plateau(Schedule):
    """The rate falls when validation has not improved for more than ``patience`` epochs.

    DRAGN's code: macro F1, factor 0.1, patience 10.

    Args:
        monitor: ``loss``, or ``f1_macro``, macro F1 of the default rule's decisions, whichever
            rule the run has.
        factor: what the rate is multiplied by.
    """

    monitor: Monitor = "loss"
    factor: float = 0.1
    patience: int = 10

    def __post_init__(self) -> None:
        if self.monitor not in get_args(Monitor):
            raise InputError(
                "schedule plateau, option monitor",
                expected=" or ".join(get_args(Monitor)),
                got=repr(self.monitor),
                remedy="choose one of them",
            )
        check_number("schedule plateau", "factor", self.factor, 0, 0.999)
        check_whole("schedule plateau", "patience", self.patience, 0)

    @property
    def monitors(self) -> Monitor:
        return self.monitor

    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        rises = self.monitor != "loss" and BY_NAME[self.monitor].higher_is_better
        mode: Literal["min", "max"] = "max" if rises else "min"
        return ReduceLROnPlateau(optimizer, mode, self.factor, self.patience).step


@dataclass(frozen=True)
class Cosine(Schedule):
    """The rate falls along half a cosine to ``min_lr`` and stays there (FRN, eq. 5).

    Args:
        epochs: over how many epochs; None: all of the training.
    """

    min_lr: float = 1e-8
    epochs: int | None = None

    def __post_init__(self) -> None:
        check_number("schedule cosine", "min_lr", self.min_lr, 0, 1e3)
        if self.epochs is not None:
            check_whole("schedule cosine", "epochs", self.epochs, 1)

    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        length = self.epochs or epochs
        scheduler = CosineAnnealingLR(optimizer, length, self.min_lr)

        def end(score: float) -> None:
            if scheduler.last_epoch < length:  # after that PyTorch's would rise again
                scheduler.step()

        return end


@dataclass(frozen=True)
class Steps(Schedule):
    """The rate is multiplied by ``factor`` after each of some epochs; defaults are CNN-RA's."""

    milestones: tuple[int, ...] | int = (50, 75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        for milestone in self._milestones:
            check_whole("schedule step", "milestones", milestone, 1)
        check_number("schedule step", "factor", self.factor, 0, 1)

    @property
    def _milestones(self) -> tuple[int, ...]:
        given = self.milestones
        return tuple(given) if isinstance(given, tuple | list) else (given,)

    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        scheduler = MultiStepLR(optimizer, list(self._milestones), self.factor)
        return lambda score: scheduler.step()


SCHEDULES: dict[str, type[Schedule]] = {
    "cosine": Cosine,
    "none": Constant,
    "plateau": Plateau,
    "step": Steps,
}


def create_schedule(name: str, options: Mapping[str, Any] | None = None) -> Schedule:
    """Make a schedule.

    Raises:
        UnknownNameError: no schedule has this name.
        InputError: an option cannot be used.
    """
    return choose("schedule", SCHEDULES, name, options or {})
