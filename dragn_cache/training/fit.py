"""Fitting, loading and applying any method, by gradients or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.classical import (
    CLASSICAL,
    ClassicalModel,
    MachineChoice,
    create_classical,
    fit_model,
)
from dragn_cache.classical.model import require_room_to_encode
from dragn_cache.errors import SettingError
from dragn_cache.loading.stored import StoredBags
from dragn_cache.options import declarations
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.scaling import Standardise
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags, fit_scaling
from dragn_cache.training.methods import method_facts
from dragn_cache.training.model import BagClassifier, build_model, predict
from dragn_cache.training.objective import positive_weights
from dragn_cache.training.room import (
    free_for_model,
    require_room_to_predict,
    require_room_to_train,
)
from dragn_cache.training.schedules import create_schedule
from dragn_cache.training.train import Progress, train
from dragn_cache.types import Task, Warn

Model: TypeAlias = BagClassifier | ClassicalModel

# The settings that classical methods read; the others belong to training by gradients.
CLASSICAL_SETTINGS = frozenset(
    {"aggregator", "options", "tap", "scale", "pos_weight", "seed", "memory", "intervals"}
    | {"decision"}
)


class Fitted(Protocol):
    """The result of a training, by gradients (`Trained`) or not (`ClassicalFitted`)."""

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
    choices: tuple[MachineChoice, ...]
    probabilities: NDArray[np.float64]
    best_epoch: None = None
    history: tuple[dict[str, float], ...] = ()


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
        _warn_untaught(data, labels, warn)
        return train(data, config, progress=progress, warn=warn)
    config = without_unread(config, warn)
    method = create_classical(config.aggregator, config.options)
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


def require_method(
    config: TrainConfig,
    in_shape: tuple[int, ...],
    labels: int,
    *,
    sizes: Tensor,
    free: float,
    jobs: int = 1,
    warn: Warn = lambda text: None,
) -> None:
    """Raise what `fit_method` would raise for the method, its options, the tap, the schedule, or
    bags that it has too little memory for.

    Args:
        sizes: (B,) instances of the bags.
        free: bytes for so many ``jobs``, trainings at once.
        warn: is told what memory may not suffice for, and what takes long.
    """
    method_facts(config.aggregator)
    if config.aggregator in CLASSICAL:
        method = create_classical(config.aggregator, config.options)
        require_room_to_encode(method, in_shape[0], sizes, free=free / jobs)
        _require_positive_weight(config)
        return
    create_schedule(config.schedule, config.schedule_options)
    with torch.random.fork_rng(devices=[]):
        aggregator = build_model(config, in_shape, labels).aggregator
    require_room_to_train(aggregator, sizes, config.batch_size, free=free, jobs=jobs, warn=warn)
    require_room_to_predict(aggregator, sizes, free=free / jobs)


def without_unread(config: TrainConfig, warn: Warn) -> TrainConfig:
    """The settings with those at their defaults that the method does not read; ``warn`` names them.

    Aggregators read all.
    """
    if config.aggregator not in CLASSICAL:
        return config
    unread = {
        name: declared.default
        for name, declared in declarations(type(config)).items()
        if name not in CLASSICAL_SETTINGS and getattr(config, name) != declared.default
    }
    if unread:
        names = ", ".join(f"`{name}`" for name in unread)
        warn(f"{config.aggregator} is not trained by gradients and does not read {names}")
    return config.replace(**unread)


def settings_read(config: TrainConfig) -> dict[str, Any]:
    """The settings that the method reads, as TOML holds them."""
    classical = config.aggregator in CLASSICAL
    table = config.to_table().items()
    return {name: v for name, v in table if not classical or name in CLASSICAL_SETTINGS}


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
        method = create_classical(config.aggregator, config.options)
        return ClassicalModel.from_state(method, in_shape, state)
    model = build_model(config, in_shape, labels, task)
    model.load_state_dict(state)
    return model.eval()


def predict_method(
    model: Model, bags: RaggedBags | StoredBags, task: Task, device: torch.device
) -> NDArray[np.float64]:
    """Probabilities (B, L) of all bags; classical models compute on the CPU whatever the device."""
    require_room_for(model, bags, device)
    if isinstance(model, ClassicalModel):
        return model.predict(bags, task)
    return predict(model.to(device), bags.to(device=device), task)


def require_room_for(model: Model, bags: RaggedBags | StoredBags, device: torch.device) -> None:
    """Raise `InputError` unless the longest of some bags fits into memory for a trained model."""
    sizes, free = bags.offsets.diff(), free_for_model(bags, device)
    if isinstance(model, ClassicalModel):
        require_room_to_encode(model.method, bags.in_shape[0], sizes, free=free)
    else:
        require_room_to_predict(model.aggregator, sizes, free=free)


def _warn_untaught(data: LabelledBags, labels: Sequence[str], warn: Warn) -> None:
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
    _require_positive_weight(config)
    return [float(weight) for weight in weights]


def _require_positive_weight(config: TrainConfig) -> None:
    if config.pos_weight == 0:
        raise SettingError(
            "pos_weight", expected="a number above 0 for an SVM", got="0", remedy="change it"
        )
