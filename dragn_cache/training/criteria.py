"""Criteria: logits (M, L), targets (M, L) of 0 and 1 and weights (M, L) or None to a scalar.

- They work on logits, never on probabilities: every term and every gradient is finite for any
  finite logit.
- A criterion is a mean over all M·L entries. A weight of 0 makes an entry 0 and leaves the divisor
  alone, so an entry counts the same whatever else is masked.
- ``pos_weight`` (L,) multiplies the terms of positive targets.

Below, z is a logit, y its target, p = σ(z), and p_t is p where y = 1 and 1 - p where y = 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
