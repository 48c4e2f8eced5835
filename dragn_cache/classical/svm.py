"""One support vector machine for each label on encoded bags, and probabilities from its scores.

- **Judges.** C and γ are chosen, and scores turned into probabilities, on bags that the machine was
  not fitted to: the validation bags, or folds of the training bags. Folds keep groups whole, and
  the held-out scores of all folds are pooled. Where a judge lacks one class of a label, the other
  judge is used.
- **Probabilities** (Platt, 1999): σ(a·f + b), a and b of greatest likelihood on the validation
  bags' scores f. a stays positive, so that probabilities rank bags as the scores do. For
  multi-class data there is one machine for each class against the rest, and the probabilities of
  a bag are divided by their sum.
- A label that all or no training bags have, or that has no judge, has a constant probability.
- Machines are fitted on precomputed kernels: one matrix of inner products is enough for all labels
  and every C and γ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dragn_cache.classical.base import Arrays, ClassicalMethod
from dragn_cache.loading.splits import stratified_folds
from dragn_cache.types import Floats, Ints, Task

FOLDS = 5
C_GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
GAMMA_GRID = (0.1, 0.1**0.5, 1.0, 10**0.5, 10.0)
LEAST_SLOPE = 0.01

Parts = list[tuple[Ints, Ints]]
"""Pairs of rows: those that a machine is fitted to, and those that it then scores."""


@dataclass(frozen=True)
class Examples:
    """T training bags, then V validation bags.

    Attributes:
        encoded: (T + V, E).
        targets: (T + V, L) of 0 and 1.
        groups: T names; an empty one is a group of its own.
    """

    encoded: Floats
    targets: NDArray[np.int8]
    groups: tuple[str, ...]

    @property
    def training(self) -> int:
        """T."""
        return len(self.groups)


@dataclass(frozen=True)
class MachineChoice:
    """The settings that were chosen for one label's machine.

    Attributes:
        judge: ``validation`` or ``folds`` chose C and γ; ``none``: a constant probability.
        c, gamma: the chosen values; gamma is None for a linear machine.
        average_precision: on the judge's bags.
        slope, offset: a and b of its probabilities σ(a·f + b).
        note: a remark for the user where something is unusual.
    """

    judge: str
    c: float | None
    gamma: float | None
    average_precision: float | None
    slope: float
    offset: float
    note: str


def fit_machines(
    examples: Examples, method: ClassicalMethod, weights: Sequence[float], seed: int
) -> tuple[Arrays, list[MachineChoice]]:
    """Fit a machine for each label.

    Args:
        weights: L, weight of a positive bag relative to a negative one.
        seed: of the folds.

    Returns:
        ``slope``, ``offset`` and ``intercept`` (L,), and ``weights`` (L, E) of linear machines, or
        ``support`` (S, E), ``dual`` (L, S) and ``gamma`` (L,) of RBF ones; and each label's choice.
    """
    kernels = KernelMatrices.of(examples, method)
    labels = range(examples.targets.shape[1])
    judges = [_judges(examples, k, method.select, seed) for k in labels]
    best = _search(kernels, examples, method, weights, judges)
    dual = np.zeros((len(labels), examples.training))
    intercept, choices = np.zeros(len(labels)), []
    for k in labels:
        if k not in best:
            choices.append(_constant(examples.targets[: examples.training, k]))
            continue
        score, c, gamma = best[k]
        kernel, y = kernels.at(gamma), examples.targets[:, k]
        machine = _machine(kernel[: examples.training], y[: examples.training], c, weights[k])
        dual[k, machine.support_] = machine.dual_coef_[0]
        intercept[k] = machine.intercept_[0]
        calibrating = next(name for name in ("validation", "folds") if name in judges[k])
        scores, truth = _held_out(kernel, y, judges[k][calibrating], c, weights[k])
        slope, offset = fit_sigmoid(scores, truth)
        judge = next(iter(judges[k]))
        note = _note(judge, calibrating, method.select, slope)
        choices.append(MachineChoice(judge, c, gamma, score, slope, offset, note))
    arrays = _stored(examples.encoded[: examples.training], dual, choices, method)
    return arrays | {"intercept": intercept}, choices


def decision_values(arrays: Arrays, encoded: Floats) -> Floats:
    """Scores (B, L) of encoded bags (B, E); positive where the machine predicts the label."""
    if "weights" in arrays:
        linear: Floats = encoded @ arrays["weights"].T + arrays["intercept"]
        return linear
    squares = squared_distances(encoded, arrays["support"])
    scores = [
        np.exp(-gamma * squares) @ dual
        for gamma, dual in zip(arrays["gamma"], arrays["dual"], strict=True)
    ]
    return np.stack(scores, axis=1) + arrays["intercept"]


def machine_probabilities(arrays: Arrays, encoded: Floats, task: Task) -> Floats:
    """Probabilities (B, L) of encoded bags (B, E)."""
    logits = arrays["slope"] * decision_values(arrays, encoded) + arrays["offset"]
    logs = -np.logaddexp(0, -logits)
    if task == "multiclass":
        logs -= np.logaddexp.reduce(logs, axis=1, keepdims=True)
    result: Floats = np.exp(logs)
    return result


def squared_distances(a: Floats, b: Floats) -> Floats:
    """(M, T): ‖a_i − b_j‖² of rows (M, E) and (T, E)."""
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * (a @ b.T)
    clipped: Floats = np.maximum(squares, 0)
    return clipped


@dataclass(frozen=True)
class KernelMatrices:
    """Kernels between all examples and the training ones.

    Attributes:
        products: (T + V, T): inner products, or squared distances for RBF kernels.
        cs, gammas: the grid of values; gammas is [None] for linear machines.
    """

    products: Floats
    cs: list[float]
    gammas: list[float | None]

    @classmethod
    def of(cls, examples: Examples, method: ClassicalMethod) -> KernelMatrices:
        """The kernels of a method, and its grid in units of the training bags' mean square."""
        training = examples.encoded[: examples.training]
        if method.svm == "linear":
            unit = float((training**2).sum(1).mean()) or 1.0
            cs = [c / unit for c in C_GRID] if method.c == "search" else [float(method.c)]
            return cls(examples.encoded @ training.T, cs, [None])
        squares = squared_distances(examples.encoded, training)
        unit = float(squares[: examples.training].mean()) or 1.0
        cs = list(C_GRID) if method.c == "search" else [float(method.c)]
        gammas: list[float | None] = (
            [g / unit for g in GAMMA_GRID] if method.gamma == "search" else [float(method.gamma)]
        )
        return cls(squares, cs, gammas)

    def at(self, gamma: float | None) -> Floats:
        """(T + V, T)."""
        if gamma is None:
            return self.products
        kernel: Floats = np.exp(-gamma * self.products)
        return kernel


def _search(
    kernels: KernelMatrices,
    examples: Examples,
    method: ClassicalMethod,
    weights: Sequence[float],
    judges: list[dict[str, Parts]],
) -> dict[int, tuple[float, float, float | None]]:
    """For each label with a judge: the highest average precision, with its smallest γ and C."""
    from sklearn.metrics import average_precision_score

    best: dict[int, tuple[float, float, float | None]] = {}
    for gamma in kernels.gammas:
        kernel = kernels.at(gamma)
        for k, label_judges in enumerate(judges):
            for c in kernels.cs if label_judges else ():
                parts = next(iter(label_judges.values()))
                scores, truth = _held_out(kernel, examples.targets[:, k], parts, c, weights[k])
                score = float(average_precision_score(truth, scores))
                if k not in best or score > best[k][0]:
                    best[k] = (score, c, gamma)
    return best


def _judges(examples: Examples, label: int, preferred: str, seed: int) -> dict[str, Parts]:
    """The judges of a label's machine, the preferred one first; empty if no bags can judge it."""
    y, T = examples.targets[:, label], examples.training
    rows = np.arange(len(y))
    judges: dict[str, Parts] = {}
    if _both(y[:T]) and _both(y[T:]):
        judges["validation"] = [(rows[:T], rows[T:])]
    if preferred == "folds" or not judges:
        parts = _folds(y[:T], examples.groups, seed)
        if parts:
            judges = {"folds": parts, **judges}
    return judges


def _folds(y: NDArray[np.int8], groups: tuple[str, ...], seed: int) -> Parts:
    """Folds of bags with labels y (T,), groups whole; empty if a fold's rest lacks a class."""
    distinct = len(set(groups) - {""}) + groups.count("")
    count = min(FOLDS, distinct, int(y.sum()), int((1 - y).sum()))
    if count < 2:
        return []
    fold = stratified_folds(y[:, None], groups, [1 / count] * count, seed=seed)
    parts = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(count)]
    return parts if all(_both(y[fitted]) for fitted, _ in parts) else []


def _held_out(
    kernel: Floats, y: NDArray[np.int8], parts: Parts, c: float, weight: float
) -> tuple[Floats, NDArray[np.int8]]:
    """Scores and labels of all rows that were held out, (M,) each."""
    scores = []
    for fitted, scored in parts:
        machine = _machine(kernel[np.ix_(fitted, fitted)], y[fitted], c, weight)
        scores.append(machine.decision_function(kernel[np.ix_(scored, fitted)]))
    return np.concatenate(scores), y[np.concatenate([scored for _, scored in parts])]


def _machine(kernel: Floats, y: NDArray[np.int8], c: float, weight: float) -> Any:
    """A machine fitted to T bags with a kernel (T, T)."""
    from sklearn.svm import SVC

    machine = SVC(C=c, kernel="precomputed", class_weight={0: 1.0, 1: weight})
    return machine.fit(kernel, y)


def fit_sigmoid(scores: Floats, y: NDArray[np.int8]) -> tuple[float, float]:
    """Slope a ≥ `LEAST_SLOPE` and offset b of σ(a·f + b) for scores f (M,) of labels y (M,).

    They have the greatest likelihood for targets (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) instead of 1 and
    0, which keeps them finite where the scores separate the labels (Platt, 1999).
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    positive = int(y.sum())
    negative = len(y) - positive
    targets = np.where(y == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def cross_entropy(coefficients: Floats) -> tuple[float, Floats]:
        slope, offset = coefficients
        logits = slope * scores + offset
        errors = expit(logits) - targets
        loss = float((np.logaddexp(0, logits) - targets * logits).sum())
        return loss, np.array([scores @ errors, errors.sum()])

    # The loss is convex. With ftol = 0 the search ends where rounding hides any further descent.
    # SciPy may report that as a failed line search, so its success flag is not used.
    optimum = minimize(
        cross_entropy,
        x0=[LEAST_SLOPE, np.log((positive + 1) / (negative + 1))],
        jac=True,
        method="L-BFGS-B",
        bounds=[(LEAST_SLOPE, None), (None, None)],
        options={"ftol": 0.0, "gtol": 1e-9},
    ).x
    return float(optimum[0]), float(optimum[1])


def _constant(y: NDArray[np.int8]) -> MachineChoice:
    """The choice for a label without a machine: its share of training bags, by Laplace's rule."""
    share = (int(y.sum()) + 1) / (len(y) + 2)
    note = f"{int(y.sum())} of {len(y)} training bags have it"
    if _both(y):
        note += ", too few to hold some out, and validation lacks a class"
    note += f": its probability is always {share:.3g}"
    return MachineChoice("none", None, None, None, 0.0, float(np.log(share / (1 - share))), note)


def _note(judge: str, calibrating: str, preferred: str, slope: float) -> str:
    notes = []
    if judge != preferred:
        notes.append(f"C and γ are chosen on {judge}: {preferred} lacked a class")
    if calibrating != "validation":
        notes.append("its probabilities come from training folds: validation lacks a class")
    if slope == LEAST_SLOPE:
        notes.append("its machine does no better than chance on the bags held out")
    return "; ".join(notes)


def _stored(
    training: Floats, dual: Floats, choices: list[MachineChoice], method: ClassicalMethod
) -> Arrays:
    arrays: Arrays = {
        "slope": np.array([choice.slope for choice in choices]),
        "offset": np.array([choice.offset for choice in choices]),
    }
    if method.svm == "linear":
        return arrays | {"weights": dual @ training}
    used = (dual != 0).any(0)
    gamma = np.array([choice.gamma or 0.0 for choice in choices])
    return arrays | {"support": training[used], "dual": dual[:, used], "gamma": gamma}


def _both(y: NDArray[np.int8]) -> bool:
    return bool(0 < y.sum() < len(y))
