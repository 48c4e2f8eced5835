"""What training minimises: losses of logits against 0/1 targets, and what a batch should become.

- A loss is asked for its criterion at every epoch, because some change while they train: FRN's
  focus grows, its weights of positives go up and down. Epochs count from 1; formulas that count
  from 0 take epoch - 1.
- Criteria work on logits, never on probabilities: every term and every gradient is finite for any
  finite logit.
- A criterion is a mean over all M·L entries. A weight of 0 makes an entry 0 and leaves the divisor
  alone, so an entry counts the same whatever else is masked.

Below, z is a logit, y its target, p = σ(z), and p_t is p where y = 1 and 1 - p where y = 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dragn_cache.aggregators.supervision import Criterion
from dragn_cache.errors import InputError
from dragn_cache.old_options import check_number, check_whole, choose
from dragn_cache.types import Task

# --- criteria ----------------------------------------------------------------------------------
# Each takes logits (M, L), targets (M, L) of 0 and 1 and weights (M, L) or None to a scalar;
# ``pos_weight`` (L,) multiplies the terms of positive targets.


def bce(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy: mean of -log p_t."""
    return F.binary_cross_entropy_with_logits(
        logits,
        targets.to(logits),
        None if weight is None else weight.to(logits),
        pos_weight=None if pos_weight is None else pos_weight.to(logits),
    )


def cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of one-hot targets: mean over rows of -log softmax(z)_class.

    ``weight`` multiplies a row's term by what its class counts.
    """
    classes = targets.argmax(1)
    if weight is None:
        return F.cross_entropy(logits, classes)
    terms = F.cross_entropy(logits, classes, reduction="none")
    return (terms * weight.to(logits).gather(1, classes[:, None]).squeeze(1)).mean()


def focal(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float,
    alpha: float | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Focal loss: mean of -α_t (1 - p_t)^γ log p_t (Lin et al., 2017, eq. 5; FRN, eq. 1).

    Args:
        gamma: how fast entries that are right already stop to count; 0 is ``bce``.
        alpha: α_t is alpha where y = 1 and 1 - alpha where y = 0; None is 1 for both.
    """
    y = targets.to(logits)
    terms = _terms(logits, y, pos_weight)
    # 1 - p_t = σ(-z_t): as a power of e its gradient is finite where it is 0.
    terms = terms * (gamma * F.logsigmoid(logits * (1 - 2 * y))).exp()
    if alpha is not None:
        terms = terms * (alpha * y + (1 - alpha) * (1 - y))
    return _mean(terms, weight)


def frn(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """FRN's loss: mean of (1 - e^-ℓ)^γ ℓ, where ℓ is the weighted binary cross-entropy.

    ℓ = -w y log p - (1 - y) log(1 - p), w = ``pos_weight``. Without weights 1 - e^-ℓ is 1 - p_t,
    and it is the focal loss. FRN, sections IV.A and IV.B, with w as its code has it.

    Args:
        gamma: at least 1.
    """
    terms = _terms(logits, targets.to(logits), pos_weight)
    difficulty = -torch.expm1(-terms)
    return _mean(difficulty**gamma * terms, weight)


def fec(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float,
    gamma: float,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """FECLoss of FlyIT: mean of w ℓ; errors of a label count more where it has many of their kind.

    w_ij = 1 + α [(cFP_j 1[y_ij = 0, p_ij > ½])^γ + (cFN_j 1[y_ij = 1, p_ij < ½])^γ] with
    cFP_j = FP_j / (TN_j + 1) and cFN_j = FN_j / (TP_j + 1) counted over the M rows at p = ½; w is a
    constant for the gradient, ℓ the binary cross-entropy. Entries of weight 0 are not counted.

    Args:
        gamma: above 0.
    """
    y = targets.to(logits)
    counted = torch.ones_like(y) if weight is None else weight.to(y)
    positive, negative = counted * y, counted * (1 - y)
    too_high, too_low = (1 - y) * (logits > 0), y * (logits < 0)
    fp, fn = (counted * too_high).sum(0), (counted * too_low).sum(0)
    false_high = fp / (negative.sum(0) - fp + 1)
    false_low = fn / (positive.sum(0) - fn + 1)
    factor = 1 + alpha * ((false_high * too_high) ** gamma + (false_low * too_low) ** gamma)
    return _mean(factor.detach() * _terms(logits, y, pos_weight), weight)


def asymmetric(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    gamma_neg: float,
    gamma_pos: float,
    clip: float,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Asymmetric loss: mean of -(1 - p)^γ+ log p where y = 1, -p_m^γ- log(1 - p_m) where y = 0.

    p_m = max(p - clip, 0): negatives below ``clip`` count nothing (Ridnik et al., 2021, eq. 4-7).
    """
    y = targets.to(logits)
    positive = (gamma_pos * F.logsigmoid(-logits)).exp() * F.softplus(-logits)
    if pos_weight is not None:
        positive = positive * pos_weight.to(logits)
    if clip == 0:
        negative = (gamma_neg * F.logsigmoid(logits)).exp() * F.softplus(logits)
    else:
        shifted = logits.sigmoid() - clip
        above = shifted > 0
        # A stand-in where p_m is 0: powers below 1 have no gradient there.
        p = torch.where(above, shifted, torch.full_like(shifted, 0.5))
        # 1 - p_m = 1 - p + clip, which is above 0 however large z is.
        negative = -(p**gamma_neg) * ((-logits).sigmoid() + clip).log() * above
    return _mean(y * positive + (1 - y) * negative, weight)


def _terms(logits: Tensor, targets: Tensor, pos_weight: Tensor | None) -> Tensor:
    """(M, L): binary cross-entropy of each entry."""
    return F.binary_cross_entropy_with_logits(
        logits,
        targets,
        pos_weight=None if pos_weight is None else pos_weight.to(logits),
        reduction="none",
    )


def _mean(terms: Tensor, weight: Tensor | None) -> Tensor:
    return terms.mean() if weight is None else (terms * weight.to(terms)).mean()


# --- losses ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss(ABC):
    """A criterion for each epoch. The fields of a subclass are its options.

    Class attributes:
        task: what its targets are.
        balanced: whether positives weigh (N - n) / n unless another ``pos_weight`` is given.
    """

    task: ClassVar[Task] = "multilabel"
    balanced: ClassVar[bool] = False

    @abstractmethod
    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        """The criterion of an epoch, counted from 1; ``pos_weight`` (L,) is of positive targets."""


@dataclass(frozen=True)
class Bce(Loss):
    """`bce`: DRAGN's, and most others'."""

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        return partial(bce, pos_weight=pos_weight)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """`cross_entropy`, for classes that exclude each other."""

    task: ClassVar[Task] = "multiclass"

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        return cross_entropy


@dataclass(frozen=True)
class Focal(Loss):
    """`focal`, by default with the numbers of Lin et al. (2017), section 5.1."""

    alpha: float | None = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_number("loss focal", "alpha", self.alpha, 0, 1)
        check_number("loss focal", "gamma", self.gamma, 0, 100)

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        return partial(focal, gamma=self.gamma, alpha=self.alpha, pos_weight=pos_weight)


@dataclass(frozen=True)
class WeightedBce(Loss):
    """`bce` whose positives weigh w = (N - n) / n, tempered if asked for (FRN, IV.A and IV.B).

    Multiple tempering: the weight in epoch e, from 0, is 1 + λ(e) (w - 1), where λ is 1 before
    ``temper_from``, ½ (1 + cos(π (e - temper_from) / temper)) until ``temper_to``, and stays there.

    Args:
        temper: half a period in epochs, 10 in FRN's code and 30 in its text; None: λ = 1.
        temper_from, temper_to: first and last epoch of it, from 0.
    """

    balanced: ClassVar[bool] = True
    where: ClassVar[str] = "loss weighted_bce"
    temper: float | None = None
    temper_from: int = 40
    temper_to: int = 85

    def __post_init__(self) -> None:
        if self.temper is not None:
            check_number(self.where, "temper", self.temper, 1, 1e6)
        check_whole(self.where, "temper_from", self.temper_from, 0)
        check_whole(self.where, "temper_to", self.temper_to, self.temper_from)

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
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


@dataclass(frozen=True)
class Frn(WeightedBce):
    """`frn` with weights as `WeightedBce` has them and a focus that grows (FRN, IV.B).

    γ in epoch e, from 0, is 1 + (gamma - 1) · ½ (1 - cos(π e / anneal)), from e = anneal on gamma.

    Args:
        gamma: at least 1.
        anneal: epochs until γ is ``gamma``; 0: at once.
    """

    where: ClassVar[str] = "loss frn"
    gamma: float = 2.0
    anneal: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.where, "gamma", self.gamma, 1, 100)
        check_whole(self.where, "anneal", self.anneal, 0)

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        weight = self.tempered(epoch, pos_weight)
        return partial(frn, gamma=self.focus(epoch), pos_weight=weight)

    def focus(self, epoch: int) -> float:
        """γ of an epoch, counted from 1."""
        if epoch > self.anneal:
            return float(self.gamma)
        return 1 + (self.gamma - 1) * 0.5 * (1 - math.cos(math.pi * (epoch - 1) / self.anneal))


@dataclass(frozen=True)
class Fec(Loss):
    """`fec`, by default with the numbers that FlyIT found best."""

    alpha: float = 4.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_number("loss fec", "alpha", self.alpha, 0, 1e6)
        check_number("loss fec", "gamma", self.gamma, 1e-3, 100)

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        return partial(fec, alpha=self.alpha, gamma=self.gamma, pos_weight=pos_weight)


@dataclass(frozen=True)
class Asymmetric(Loss):
    """`asymmetric`; plain cross-entropy for positives unless ``gamma_pos`` is given."""

    gamma_neg: float = 4.0
    gamma_pos: float = 0.0
    clip: float = 0.05

    def __post_init__(self) -> None:
        check_number("loss asymmetric", "gamma_neg", self.gamma_neg, 0, 100)
        check_number("loss asymmetric", "gamma_pos", self.gamma_pos, 0, 100)
        check_number("loss asymmetric", "clip", self.clip, 0, 0.99)

    def at(self, epoch: int, pos_weight: Tensor | None = None) -> Criterion:
        return partial(
            asymmetric,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            clip=self.clip,
            pos_weight=pos_weight,
        )


LOSSES: dict[str, type[Loss]] = {
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
        raise InputError(
            f"--loss {name}",
            expected=f"a loss for a {task} task",
            got=f"one for {loss.task}",
            remedy=f"choose auto or one of: {', '.join(fitting)}",
        )
    return loss
