"""Stage two's training: an aggregator and a linear head on cached features, best epoch kept.

Validation chooses the epoch (lowest loss), test only reports. Everything random comes from one
seed, so the same seed on the same machine gives the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.devices import find_device
from dragn_cache.errors import DragnCacheError
from dragn_cache.loading.feeds import Feed, in_order
from dragn_cache.loading.stored import StoredBags
from dragn_cache.ragged import RaggedBags
from dragn_cache.scoring.metrics import evaluate
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags, fit_aggregator, fit_scaling, present
from dragn_cache.training.model import BagClassifier, build_model, logits_of, predict, probabilities
from dragn_cache.training.objective import Objective, masked, positive_weights
from dragn_cache.training.optimisation import create_optimizer
from dragn_cache.training.room import (
    free_for_model,
    require_room_to_predict,
    require_room_to_train,
)
from dragn_cache.training.schedules import Monitor, create_schedule
from dragn_cache.training.start import best_constant, start_at
from dragn_cache.types import Warn

Progress = Callable[[dict[str, float]], None]
"""Called after every epoch with its row of the history."""


@dataclass(frozen=True)
class Trained:
    """A trained model: its best epoch's weights, the history, and every bag's probabilities."""

    model: BagClassifier
    best_epoch: int
    history: tuple[dict[str, float], ...]
    probabilities: NDArray[np.float64]


def train(
    data: LabelledBags,
    config: TrainConfig,
    *,
    progress: Progress | None = None,
    warn: Warn = lambda text: None,
) -> Trained:
    """Train on the training bags, keep the epoch of lowest validation loss, or the last.

    Args:
        warn: is told what memory may not suffice for, and what takes long.

    Returns:
        the model (on the CPU, in evaluation mode) and probabilities (B, L) of all bags.

    Raises:
        InputError: ``config.views`` asks for views that the data do not have, the loss or the
            schedule cannot be used, there is a stage mask without ``data.possible``, or the
            longest bag needs more memory than there is.
        DragnCacheError: a loss or a bag's probability is not finite.
    """
    device = find_device(config.device)
    objective = Objective(data, config, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        model = build_model(config, data.bags.in_shape, data.targets.shape[1], data.task).to(device)
        require_room(model, data, config, warn=warn)
        generator = torch.Generator().manual_seed(config.order_seed)
        shuffle = model.aggregator.order_sensitive and config.order == "random"
        feed, bags = present(data, config, device, shuffle=shuffle)
        fit_scaling(model.scaling, bags, data)
        fit_aggregator(model, bags, data)
        weights = positive_weights(data, config, device)
        rows = torch.from_numpy(data.rows("train"))
        start_at(model, best_constant(objective.supervision(rows, weights, epoch=1)))
        fit = _Fit(model, feed, bags, data, config, objective, weights)
        best_epoch, history = fit.run(generator, progress)
    predicted = masked(_finite(predict(model, bags, data.task)), data, config)
    return Trained(model.cpu(), best_epoch, tuple(history), predicted)


def require_room(
    model: BagClassifier,
    data: LabelledBags,
    config: TrainConfig,
    *,
    models: int = 1,
    warn: Warn = lambda text: None,
) -> None:
    """Raise `InputError` unless training and evaluation with the longest bags fit into memory.

    Args:
        models: how many like this one are trained at once.
        warn: is told what memory may not suffice for, and what takes long.
    """
    sizes = data.bags.offsets.diff()
    free = free_for_model(data.bags, find_device(config.device)) / models
    training = sizes[torch.from_numpy(data.rows("train"))]
    require_room_to_train(model.aggregator, training, config.batch_size, free=free, warn=warn)
    require_room_to_predict(model.aggregator, sizes, free=free)


def _finite(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities (B, L) as they are; `DragnCacheError` if one is not finite."""
    wrong = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if len(wrong):
        raise DragnCacheError(
            "predicting",
            expected="finite probabilities for every bag",
            got=f"{len(wrong)} of {len(probabilities)} bags without, first number {wrong[0]}",
            remedy="correct the aggregator: it may not stand bags of one instance, or equal ones",
        )
    return probabilities


@dataclass
class _Fit:
    """One training: what it needs, and its epochs one after the other."""

    model: BagClassifier
    feed: Feed
    bags: RaggedBags | StoredBags
    data: LabelledBags
    config: TrainConfig
    objective: Objective
    pos_weight: Tensor | None

    def run(
        self, generator: torch.Generator, progress: Progress | None
    ) -> tuple[int, list[dict[str, float]]]:
        """Train; the model is left with the weights of the best epoch, whose number is returned."""
        config = self.config
        optimizer = create_optimizer(config, self.model.parameters())
        schedule = create_schedule(config.schedule, config.schedule_options)
        end_epoch = schedule.start(optimizer, config.epochs)
        history: list[dict[str, float]] = []
        best: tuple[float, int, dict[str, Any]] = (float("inf"), 0, {})
        for epoch in range(1, config.epochs + 1):
            row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
            row["train_loss"] = self._train_epoch(epoch, optimizer, generator)
            scores = self._validate(schedule.monitors)
            row["validation_loss"] = scores["loss"]
            error = divergence(row, config)
            if error is not None:
                raise error
            history.append(row)
            chosen = epoch == config.epochs if config.keep == "last" else scores["loss"] < best[0]
            if chosen:
                best = (scores["loss"], epoch, copy.deepcopy(self.model.state_dict()))
            if progress is not None:
                progress(row)
            if config.patience and epoch - best[1] >= config.patience:
                break
            end_epoch(scores[schedule.monitors])
        self.model.load_state_dict(best[2])
        return best[1], history

    def _train_epoch(
        self, epoch: int, optimizer: torch.optim.Optimizer, generator: torch.Generator
    ) -> float:
        """The mean loss of the bags, each measured before the step that it takes part in."""
        self.model.train()
        total = 0.0
        for batch, rows in self.feed.epoch(self.config.batch_size, generator):
            supervision = self.objective.supervision(rows, self.pos_weight, epoch)
            logits, auxiliary = self.model(batch, supervision=supervision)
            loss = supervision.loss(logits)
            total += loss.item() * len(rows)
            optimizer.zero_grad()
            weighted = self.model.aggregator.bag_weight * loss
            (weighted if auxiliary is None else weighted + auxiliary).backward()
            optimizer.step()
        return total / len(self.feed)

    @torch.no_grad()
    def _validate(self, monitored: Monitor) -> dict[Monitor, float]:
        """The loss of the validation bags, and the score that is monitored besides."""
        rows = self.data.rows("validation")
        logits = logits_of(self.model, in_order(self.bags, torch.from_numpy(rows)))
        supervision = self.objective.supervision(torch.from_numpy(rows), self.pos_weight)
        scores: dict[Monitor, float] = {"loss": float(supervision.loss(logits))}
        if monitored != "loss":
            task = self.data.task
            p = masked(probabilities(logits, task), self.data, self.config, rows)
            all_scores = evaluate(self.data.targets[rows], p, task=task, intervals=0)
            scores[monitored] = all_scores[monitored]
        return scores


def divergence(row: dict[str, float], config: TrainConfig) -> DragnCacheError | None:
    """The error that ends a training whose losses in a row of the history are not finite."""
    if np.isfinite([row["train_loss"], row["validation_loss"]]).all():
        return None
    return DragnCacheError(
        f"epoch {row['epoch']:.0f}",
        expected="a finite loss",
        got=f"training {row['train_loss']:g}, validation {row['validation_loss']:g}",
        remedy=f"lower `lr` (now {config.lr:g})",
    )
