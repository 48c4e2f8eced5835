"""What training minimises: a criterion for each epoch, and the options that decide it.

A loss is asked for its criterion at every epoch, because some change while they train: FRN's focus
grows, its weights of positives go up and down. Epochs count from 1; formulas that count from 0 take
epoch - 1. The criteria themselves, and torch with them, are imported when one is asked for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from dragn_cache.errors import SettingError
from dragn_cache.options import Settings, choose, setting

if TYPE_CHECKING:
    from torch import Tensor

    from dragn_cache.aggregators.supervision import Criterion
    from dragn_cache.types import Task

option = partial(setting, sweep=True)


class Loss(Settings, ABC):
    """A criterion for each epoch. The settings of a subclass are its options.

    Class attributes:
        task: what its targets are.
        balanced: whether positives weigh (N - n) / n unless another ``pos_weight`` is given.
    """

    task: ClassVar[Task] = "multilabel"
    balanced: ClassVar[bool] = False

    @abstractmethod
    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        """The criterion of an epoch, counted from 1; ``pos_weight`` (L,) is of positive targets."""


class Bce(Loss):
    """`bce`: DRAGN's, and most others'."""

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        from dragn_cache.training.criteria import bce

        return partial(bce, pos_weight=pos_weight)


class CrossEntropy(Loss):
    """`cross_entropy`, for classes that exclude each other."""

    task: ClassVar[Task] = "multiclass"

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        from dragn_cache.training.criteria import cross_entropy

        return cross_entropy


class Focal(Loss):
    """`focal`, by default with the numbers of Lin et al. (2017), section 5.1."""

    alpha: float | None = option(
        0.25, ge=0, le=1, help="Weight of positives, of negatives the rest up to 1; none is 1 each."
    )
    gamma: float = option(
        2.0, ge=0, le=100, help="How fast entries that are right already stop to count."
    )

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        from dragn_cache.training.criteria import focal

        return partial(focal, gamma=self.gamma, alpha=self.alpha, pos_weight=pos_weight)


class WeightedBce(Loss):
    """`bce` whose positives weigh w = (N - n) / n, tempered if asked for (FRN, IV.A and IV.B).

    Multiple tempering: the weight in epoch e, from 0, is 1 + λ(e) (w - 1), where λ is 1 before
    ``temper_from``, ½ (1 + cos(π (e - temper_from) / temper)) until ``temper_to``, and stays there.
    Without ``temper`` λ = 1; FRN's code has 10, its text 30.
    """

    balanced: ClassVar[bool] = True
    temper: float | None = option(
        None, ge=1, le=1e6, help="Half a period of the weights' tempering in epochs; none is off."
    )
    temper_from: int = option(40, ge=0, help="First epoch of tempering, from 0.")
    temper_to: int = option(85, ge=0, help="Last epoch of tempering, from 0.")

    def require_consistent(self) -> None:
        if self.temper_to < self.temper_from:
            raise SettingError(
                "temper_to",
                expected=f"a whole number of at least temper_from, {self.temper_from}",
                got=str(self.temper_to),
                remedy="change one of them",
            )

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        from dragn_cache.training.criteria import bce

        return partial(bce, pos_weight=self.tempered(epoch, pos_weight))

    def share(self, epoch: int) -> float:
        """λ of an epoch, counted from 1."""
        e = min(epoch - 1, self.temper_to)
        if self.temper is None or e < self.temper_from:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (e - self.temper_from) / self.temper))

    def tempered(self, epoch: int, pos_weight: Tensor | None) -> Tensor | None:
        """(L,): the weights of an epoch."""
        return None if pos_weight is None else 1 + self.share(epoch) * (pos_weight - 1)


class Frn(WeightedBce):
    """`frn` with weights as `WeightedBce` has them and a focus that grows (FRN, IV.B).

    γ in epoch e, from 0, is 1 + (gamma - 1) · ½ (1 - cos(π e / anneal)), from e = anneal on gamma.
    """

    gamma: float = option(
        2.0, ge=1, le=100, help="How fast entries that are right already stop to count, at last."
    )
    anneal: int = option(10, ge=0, help="Epochs until it is gamma; 0 is at once.")

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        from dragn_cache.training.criteria import frn

        weight = self.tempered(epoch, pos_weight)
        return partial(frn, gamma=self.focus(epoch), pos_weight=weight)

    def focus(self, epoch: int) -> float:
        """γ of an epoch, counted from 1."""
        if epoch > self.anneal:
            return float(self.gamma)
        return 1 + (self.gamma - 1) * 0.5 * (1 - math.cos(math.pi * (epoch - 1) / self.anneal))


class Fec(Loss):
    """`fec`, by default with the numbers that FlyIT found best."""

    alpha: float = option(
        4.0, ge=0, le=1e6, help="How much more errors count where a label has many of their kind."
    )
    gamma: float = option(1.0, ge=1e-3, le=100, help="Power of the share of such errors.")

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        from dragn_cache.training.criteria import fec

        return partial(fec, alpha=self.alpha, gamma=self.gamma, pos_weight=pos_weight)


class Asymmetric(Loss):
    """`asymmetric`; plain cross-entropy for positives unless ``gamma_pos`` is given."""

    gamma_neg: float = option(4.0, ge=0, le=100, help="Focus on wrong negatives.")
    gamma_pos: float = option(0.0, ge=0, le=100, help="Focus on wrong positives.")
    clip: float = option(
        0.05, ge=0, le=0.99, help="Probability below which negatives count nothing."
    )

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        from dragn_cache.training.criteria import asymmetric

        return partial(
            asymmetric,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            clip=self.clip,
            pos_weight=pos_weight,
        )


LOSSES: Mapping[str, type[Loss]] = {
    "asymmetric": Asymmetric,
    "bce": Bce,
    "cross_entropy": CrossEntropy,
    "fec": Fec,
    "focal": Focal,
    "frn": Frn,
    "weighted_bce": WeightedBce,
}


def create_loss(name: str, task: Task, options: Mapping[str, Any] | None = None) -> Loss:
    """Make a loss for a task; ``auto`` is ``bce`` or, where classes exclude each other,
    ``cross_entropy``.

    Raises:
        UnknownNameError: no loss has this name.
        InputError: it is for the other task, or an option cannot be used.
    """
    if name == "auto":
        name = "bce" if task == "multilabel" else "cross_entropy"
    loss = choose("loss", LOSSES, name, options or {})
    if loss.task != task:
        fitting = [n for n, cls in LOSSES.items() if cls.task == task]
        raise SettingError(
            "loss",
            expected=f"a loss for a {task} task",
            got=f"{name}, one for {loss.task}",
            remedy=f"choose auto or one of: {', '.join(fitting)}",
        )
    return loss
