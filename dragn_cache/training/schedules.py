"""How the learning rate goes on, by name; the schedulers are PyTorch's own.

A schedule is told after every epoch how validation went and sets the rate of the next one. torch is
imported when a training begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from dragn_cache.options import Settings, choose, setting
from dragn_cache.scoring.scores import BY_NAME

if TYPE_CHECKING:
    from torch.optim import Optimizer

Monitor = Literal["loss", "f1_macro"]  # besides the loss, names of scores
EpochEnd = Callable[[float], None]
"""Called after every epoch with the validation score that the schedule monitors."""

option = partial(setting, sweep=True)
Count = Annotated[int, Ge(1)]


class Schedule(Settings, ABC):
    """How the learning rate goes. The settings of a subclass are its options."""

    @property
    def monitors(self) -> Monitor:
        """The validation score that it wants to be told."""
        return "loss"

    @abstractmethod
    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        """Begin a training of ``epochs`` epochs."""


class Constant(Schedule):
    """The rate stays."""

    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        return lambda score: None


class Plateau(Schedule):
    """The rate falls when validation has not improved for more than ``patience`` epochs.

    DRAGN's code: macro F1, factor 0.1, patience 10. Macro F1 is of the default rule's decisions,
    whichever rule the run has.
    """

    monitor: Monitor = option("loss", help="Validation score that is to improve.")
    factor: float = option(0.1, ge=0, le=0.999, help="Factor of the rate.")
    patience: int = option(10, ge=0, help="Epochs without improvement that are let pass.")

    @property
    def monitors(self) -> Monitor:
        return self.monitor

    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        from torch.optim.lr_scheduler import ReduceLROnPlateau

        rises = self.monitor != "loss" and BY_NAME[self.monitor].higher_is_better
        mode: Literal["min", "max"] = "max" if rises else "min"
        return ReduceLROnPlateau(optimizer, mode, self.factor, self.patience).step


class Cosine(Schedule):
    """The rate falls along half a cosine to ``min_lr`` and stays there (FRN, eq. 5)."""

    min_lr: float = option(1e-8, ge=0, le=1e3, help="Least rate.")
    epochs: int | None = option(
        None, ge=1, help="Epochs until it is reached; none is all of the training."
    )

    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        from torch.optim.lr_scheduler import CosineAnnealingLR

        length = self.epochs or epochs
        scheduler = CosineAnnealingLR(optimizer, length, self.min_lr)

        def end(score: float) -> None:
            if scheduler.last_epoch < length:  # after that PyTorch's would rise again
                scheduler.step()

        return end


class Steps(Schedule):
    """The rate is multiplied by ``factor`` after each of some epochs; defaults are CNN-RA's."""

    milestones: Count | tuple[Count, ...] = option(
        (50, 75),
        expected="one epoch or several, each a whole number of at least 1",
        help="Epochs after which the rate changes.",
    )
    factor: float = option(0.1, ge=0, le=1, help="Factor of the rate.")

    def start(self, optimizer: Optimizer, epochs: int) -> EpochEnd:
        from torch.optim.lr_scheduler import MultiStepLR

        given = self.milestones
        milestones = list(given) if isinstance(given, tuple) else [given]
        scheduler = MultiStepLR(optimizer, milestones, self.factor)
        return lambda score: scheduler.step()


SCHEDULES: Mapping[str, type[Schedule]] = {
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
