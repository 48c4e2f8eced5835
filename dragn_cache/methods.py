"""What can be trained on bags by name: aggregators, by gradients, and classical methods, fitted.

`fit_method` trains either kind, `load_model` brings either back, `predict_method` applies either;
whoever calls these need not know which it is. What differs between them is in `Facts`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.aggregators import (
    AGGREGATORS,
    SEE_LIST,
    aggregator_class,
    options_of,
)
from dragn_cache.bags import RaggedBags
from dragn_cache.classical import CLASSICAL, Choice, ClassicalModel, create_classical, fit_model
from dragn_cache.config import TrainConfig, flag
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.feeding import StoredBags
from dragn_cache.manifest import Task
from dragn_cache.optimisation import create_schedule
from dragn_cache.scaling import Standardise
from dragn_cache.train import (
    SUPPLIED,
    BagClassifier,
    LabelledBags,
    Progress,
    build_model,
    fit_scaling,
    positive_weights,
    predict,
    train,
)

Model: TypeAlias = BagClassifier | ClassicalModel
Warn = Callable[[str], None]

# The settings that classical methods read; the others belong to training by gradients.
CLASSICAL_SETTINGS = frozenset(
    {"aggregator", "options", "tap", "scale", "pos_weight", "seed", "memory", "intervals"}
    | {"decision"}
)


@dataclass(frozen=True)
class Facts:
    """What a method is like.

    Attributes:
        needs: the tap that it is meant for, "map", "vector" or "any".
        order_sensitive: whether the order of a bag's instances counts.
        attention: whether it weighs instances.
        classifier: ``head``, layers trained with the aggregator, or ``svm``.
    """

    needs: Literal["map", "vector", "any"]
    order_sensitive: bool
    attention: bool
    classifier: Literal["head", "svm"]


class Fitted(Protocol):
    """What training gives, by gradients (`Trained`) or not (`ClassicalFitted`)."""

    @property
    def model(self) -> Model:
        """The model, on the CPU, ready to predict."""

    @property
    def best_epoch(self) -> int | None:
        """The epoch that was kept; None without epochs."""

    @property
    def history(self) -> tuple[dict[str, float], ...]:
        """One row per epoch; empty without epochs."""

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(B, L) of all bags."""


@dataclass(frozen=True)
class ClassicalFitted:
    """A fitted classical model: how each label's machine was made, and every bag's probabilities.

    ``best_epoch`` and ``history`` are what `Fitted` says for methods without epochs.
    """

    model: ClassicalModel
    choices: tuple[Choice, ...]
    probabilities: NDArray[np.float64]
    best_epoch: None = None
    history: tuple[dict[str, float], ...] = ()


def method_facts(name: str) -> Facts:
    """What the method of a name is like.

    Args:
        name: of an aggregator, a classical method, or ``package.module:Class``.

    Raises:
        UnknownNameError: there is no such method.
        InputError: a class cannot be imported, or is no aggregator.
    """
    if name in CLASSICAL:
        return Facts(CLASSICAL[name].needs, False, False, "svm")
    if ":" not in name and name not in AGGREGATORS:
        raise UnknownNameError("aggregator", name, [*AGGREGATORS, *CLASSICAL], remedy=SEE_LIST)
    cls = aggregator_class(name)
    return Facts(cls.needs, cls.order_sensitive, cls.has_attention, "head")


def method_options(name: str) -> dict[str, Any]:
    """A method's options and their defaults; "required" for one that has none.

    What training supplies, ``labels`` and ``task``, is left out.

    Raises:
        UnknownNameError, InputError: as in `method_facts`.
    """
    method_facts(name)
    if name in CLASSICAL:
        return {field.name: field.default for field in fields(CLASSICAL[name])}
    return {
        option: "required" if parameter.default is parameter.empty else parameter.default
        for option, parameter in options_of(aggregator_class(name)).items()
        if option not in SUPPLIED
    }


def method_text(name: str) -> str:
    """What the class of a method says about itself."""
    method_facts(name)
    cls: type = CLASSICAL[name] if name in CLASSICAL else aggregator_class(name)
    return inspect.cleandoc(cls.__doc__ or "")


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted([*AGGREGATORS, *CLASSICAL])


def fit_method(
    data: LabelledBags,
    config: TrainConfig,
    *,
    labels: Sequence[str],
    progress: Progress | None = None,
    warn: Warn = lambda text: None,
) -> Fitted:
    """Train the method that ``config`` names on the training bags; validation chooses.

    Args:
        labels: names of the L labels, for warnings.
        progress: called after every epoch, where there are epochs.
        warn: called with a line for what ``config`` asks for in vain, for labels that the training
            bags cannot teach, and for every label whose machine could not be made as usual.

    Returns:
        the model, its history and probabilities (B, L) of all bags.

    Raises:
        InputError: an option or the data cannot be used.
        DragnCacheError: training diverged.
    """
    method_facts(config.aggregator)
    if config.aggregator not in CLASSICAL:
        _tell_untaught(data, labels, warn)
        return train(data, config, progress=progress)
    config = without_unread(config, warn)
    method = create_classical(config.aggregator, config.options or {})
    scaling = Standardise(data.bags.in_shape[0]) if config.scale == "standard" else None
    fit_scaling(scaling, data.bags, data)
    model, choices = fit_model(
        method,
        data.bags,
        data.targets,
        data.rows("train"),
        data.rows("validation"),
        groups=data.groups or ("",) * len(data.bags),
        scaling=scaling,
        weights=_weights(data, config),
        seed=config.seed,
    )
    for label, choice in zip(labels, choices, strict=True):
        if choice.note:
            warn(f"label {label!r}: {choice.note}")
    return ClassicalFitted(model, tuple(choices), model.predict(data.bags, data.task))


def check_method(config: TrainConfig, in_shape: tuple[int, ...], labels: int) -> None:
    """Raise what `fit_method` would raise for the method, its options, the tap or the schedule."""
    method_facts(config.aggregator)
    if config.aggregator in CLASSICAL:
        create_classical(config.aggregator, config.options or {})
        _refuse_zero_weight(config)
        return
    create_schedule(config.schedule, config.schedule_options)
    with torch.random.fork_rng(devices=[]):
        build_model(config, in_shape, labels)


def without_unread(config: TrainConfig, warn: Warn) -> TrainConfig:
    """The settings with those at their defaults that the method does not read; ``warn`` names them.

    Aggregators read all.
    """
    if config.aggregator not in CLASSICAL:
        return config
    unread = {
        field.name: field.default
        for field in fields(config)
        if field.name not in CLASSICAL_SETTINGS
        and field.default is not MISSING
        and getattr(config, field.name) != field.default
    }
    if unread:
        names = ", ".join(map(flag, unread))
        warn(f"{config.aggregator} is not trained by gradients and does not read {names}")
    return replace(config, **unread)


def settings_read(config: TrainConfig) -> dict[str, Any]:
    """The settings by name that the method reads."""
    classical = config.aggregator in CLASSICAL
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if not classical or field.name in CLASSICAL_SETTINGS
    }


def load_model(
    config: TrainConfig,
    in_shape: tuple[int, ...],
    labels: int,
    task: Task,
    state: Mapping[str, Tensor],
) -> Model:
    """The model whose ``state_dict`` is given, in evaluation mode.

    Raises:
        RuntimeError, LookupError, ValueError: the state is another model's.
    """
    if config.aggregator in CLASSICAL:
        method = create_classical(config.aggregator, config.options or {})
        return ClassicalModel.from_state(method, in_shape, state)
    model = build_model(config, in_shape, labels, task)
    model.load_state_dict(state)
    return model.eval()


def predict_method(
    model: Model, bags: RaggedBags | StoredBags, task: Task, device: torch.device
) -> NDArray[np.float64]:
    """Probabilities (B, L) of all bags; classical models compute on the CPU whatever the device."""
    if isinstance(model, ClassicalModel):
        return model.predict(bags, task)
    return predict(model.to(device), bags.to(device=device), task)


def _tell_untaught(data: LabelledBags, labels: Sequence[str], warn: Warn) -> None:
    """Report labels that all training bags have, or none; classical methods say it themselves."""
    given = data.targets[data.rows("train")]
    for share, who in ((0, "no training bag has"), (1, "all training bags have")):
        names = [label for label, y in zip(labels, given.T, strict=True) if (y == share).all()]
        if names:
            warn(f"{who} {', '.join(names)}: nothing tells such bags from others")


def _weights(data: LabelledBags, config: TrainConfig) -> list[float]:
    """L, what a positive bag counts in fitting a machine."""
    weights = positive_weights(data, config, torch.device("cpu"))
    if weights is None:
        return [1.0] * data.targets.shape[1]
    _refuse_zero_weight(config)
    return [float(weight) for weight in weights]


def _refuse_zero_weight(config: TrainConfig) -> None:
    if config.pos_weight == 0:
        raise InputError(
            "--pos-weight", expected="a number above 0 for an SVM", got="0", remedy="change it"
        )
