"""Stage two's training: an aggregator and a linear head on cached features, best epoch kept.

Validation chooses the epoch (lowest loss), test only reports. Everything random comes from one
seed, so the same seed on the same machine gives the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dragn_cache.aggregators import (
    Aggregator,
    aggregator_class,
    create_aggregator,
    options_of,
)
from dragn_cache.bags import RaggedBags
from dragn_cache.config import TrainConfig
from dragn_cache.devices import find_device
from dragn_cache.errors import DragnCacheError, InputError
from dragn_cache.feeding import Feed, Presentations, StoredBags, Streamed, in_order
from dragn_cache.losses import Supervision, create_loss
from dragn_cache.manifest import Task
from dragn_cache.metrics import evaluate
from dragn_cache.optimisation import Monitor, create_optimizer, create_schedule
from dragn_cache.scaling import Standardise

Progress = Callable[[dict[str, float]], None]
"""Called after every epoch with its row of the history."""


SUPPLIED = ("labels", "task")  # options of aggregators that training knows


class BagClassifier(nn.Module):
    """[Scaling →] aggregator → dropout → linear head: RaggedBags → logits (B, L)."""

    def __init__(
        self,
        aggregator: Aggregator,
        n_labels: int,
        *,
        dropout: float = 0.0,
        seed: int = 0,
        scaling: Standardise | None = None,
    ) -> None:
        super().__init__()
        self.scaling = scaling
        self.aggregator = aggregator
        # Logits whose loss trains nothing stay whole: the history then tells what they are worth.
        self.dropout = Dropout(dropout if aggregator.bag_weight else 0.0, seed=seed)
        self.head = aggregator.head(n_labels)

    def forward(
        self,
        bags: RaggedBags,
        mask: Tensor | None = None,
        supervision: Supervision | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, L), and the aggregator's auxiliary loss if it has one.

        ``mask`` (B, D) is dropout's, where it was drawn before; see `Dropout`. ``supervision`` is
        given in training.
        """
        bags = bags if self.scaling is None else self.scaling(bags)
        result = self.aggregator(bags, supervision)
        return self.head(self.dropout(result.embedding, mask)), result.loss


class Dropout(nn.Module):
    """Dropout whose masks come from a generator of its own, on the CPU.

    So a model draws the same masks whatever trains beside it and on whichever device.

    Args:
        p: probability that an entry becomes 0 in training; the others grow by 1 / (1 - p).
        seed: of the generator.
    """

    def __init__(self, p: float, *, seed: int) -> None:
        super().__init__()
        self.p = p
        # Another stream than the one that the same seed gives the order of the bags.
        self._generator = torch.Generator().manual_seed(seed ^ 0x64726F70)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """A mask of 0 and 1 / (1 - p), float32, on the CPU."""
        if self.p == 0:
            return torch.ones(*shape)
        return (torch.rand(*shape, generator=self._generator) >= self.p) / (1 - self.p)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` times ``mask``, of its shape and drawn here if not given; ``x`` in evaluation."""
        if not self.training or (mask is None and self.p == 0):
            return x
        return x * (self.draw(x.shape) if mask is None else mask).to(x)


@dataclass(frozen=True)
class LabelledBags:
    """Features with what is to be learned: bags, targets (B, L) of 0 and 1, split of each bag.

    Attributes:
        bags: the B bags' clean features, in memory or to be read from their store.
        stacked: for training on views: ``bags`` (in the same memory), and after them the training
            bags in the first augmented view, in the second, and so on, K views in all.
        groups: the group of each bag, empty for a group of its own; () if all are.
        possible: (B, L), the labels that a bag can have, for ``config.stage_mask``.
    """

    bags: RaggedBags | StoredBags
    targets: NDArray[np.int8]
    splits: tuple[str, ...]
    task: Task
    stacked: RaggedBags | None = None
    groups: tuple[str, ...] = ()
    possible: NDArray[np.bool_] | None = None

    def rows(self, split: str) -> NDArray[np.int64]:
        """Numbers of the bags of a split."""
        return np.flatnonzero(np.array(self.splits) == split)


@dataclass(frozen=True)
class Trained:
    """A trained model: its best epoch's weights, the history, and every bag's probabilities."""

    model: BagClassifier
    best_epoch: int
    history: tuple[dict[str, float], ...]
    probabilities: NDArray[np.float64]


def train(data: LabelledBags, config: TrainConfig, *, progress: Progress | None = None) -> Trained:
    """Train on the training bags, keep the epoch of lowest validation loss, or the last.

    Returns:
        the model (on the CPU, in evaluation mode) and probabilities (B, L) of all bags.

    Raises:
        InputError: ``config.views`` asks for views that the data do not have, the loss or the
            schedule cannot be used, or there is a stage mask without ``data.possible``.
        DragnCacheError: a loss or a bag's probability is not finite.
    """
    device = find_device(config.device)
    objective = Objective(data, config, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        model = build_model(config, data.bags.in_shape, data.targets.shape[1], data.task).to(device)
        generator = torch.Generator().manual_seed(config.order_seed)
        shuffle = model.aggregator.order_sensitive and config.order == "random"
        feed, bags = present(data, config, device, shuffle=shuffle)
        fit_scaling(model.scaling, bags, data)
        fit_aggregator(model, bags, data)
        weights = positive_weights(data, config, device)
        fit = _Fit(model, feed, bags, data, config, objective, weights)
        best_epoch, history = fit.run(generator, progress)
    predicted = masked(_finite(predict(model, bags, data.task)), data, config)
    return Trained(model.cpu(), best_epoch, tuple(history), predicted)


class Objective:
    """What bags should become in each epoch of a training.

    Validation is measured with the criterion of the last epoch, so that its losses can be compared
    from epoch to epoch whatever the loss does meanwhile.

    Attributes:
        targets: (B, L) float32 of 0 and 1, on the device.
    """

    def __init__(self, data: LabelledBags, config: TrainConfig, device: torch.device) -> None:
        self.targets = torch.from_numpy(data.targets).to(device, torch.float32)
        self._loss = create_loss(config.loss, data.task, config.loss_options)
        self._last = config.epochs
        if config.stage_mask is not None and data.possible is None:
            raise InputError(
                "--stage-mask",
                expected="bags with the labels that their stages can have",
                got="none",
                remedy="train on a store, or leave it out",
            )
        self._weights: Tensor | None = None
        if config.masks_training:
            self._weights = torch.from_numpy(data.possible).to(device, torch.float32)

    def supervision(
        self, rows: Tensor, pos_weight: Tensor | None = None, epoch: int | None = None
    ) -> Supervision:
        """What the bags (b,) in ``rows`` should become.

        Args:
            pos_weight: (L,) what positive targets count.
            epoch: of training, from 1; None at validation.
        """
        chosen = rows.to(self.targets.device)
        criterion = self._loss.at(self._last if epoch is None else epoch, pos_weight)
        weights = None if self._weights is None else self._weights[chosen]
        return Supervision(self.targets[chosen], criterion, weights)


def masked(
    probabilities: NDArray[np.float64],
    data: LabelledBags,
    config: TrainConfig,
    rows: NDArray[np.int64] | slice = slice(None),
) -> NDArray[np.float64]:
    """Probabilities (…, b, L), 0 for labels that a bag cannot have if ``config`` asks for that.

    Args:
        rows: the numbers of the b bags; all of them unless given.
    """
    if not config.masks_predictions or data.possible is None:
        return probabilities
    return np.where(data.possible[rows], probabilities, 0.0)


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


def fit_scaling(
    scaling: Standardise | None, bags: RaggedBags | StoredBags, data: LabelledBags
) -> None:
    """Fit the scaling, if there is one, on the training bags."""
    if scaling is None:
        return
    training = torch.from_numpy(data.rows("train"))
    if isinstance(bags, RaggedBags):
        scaling.fit(bags.select(training))
    else:
        scaling.fit_batches(in_order(bags, training))


def fit_aggregator(model: BagClassifier, bags: RaggedBags | StoredBags, data: LabelledBags) -> None:
    """Give the aggregator what it takes from the training bags before training, scaled."""
    batches = in_order(bags, torch.from_numpy(data.rows("train")))
    scaling = model.scaling
    model.aggregator.fit(batches if scaling is None else map(scaling, batches))


def build_model(
    config: TrainConfig, in_shape: tuple[int, ...], n_labels: int, task: Task = "multilabel"
) -> BagClassifier:
    """A fresh model for instances of ``in_shape``.

    An aggregator with an option ``labels`` or ``task`` is told these.
    """
    options = dict(config.options or {})
    known = dict(zip(SUPPLIED, (n_labels, task), strict=True))
    for option in options.keys() & known.keys():
        raise InputError(
            f"{config.aggregator}, option {option}",
            expected="no value: it is the data's",
            got=repr(options[option]),
            remedy="leave it out",
        )
    options |= {
        k: v for k, v in known.items() if k in options_of(aggregator_class(config.aggregator))
    }
    aggregator = create_aggregator(config.aggregator, in_shape=in_shape, **options)
    scaling = Standardise(in_shape[0]) if config.scale == "standard" else None
    return BagClassifier(
        aggregator, n_labels, dropout=config.dropout, seed=config.seed, scaling=scaling
    )


def present(
    data: LabelledBags, config: TrainConfig, device: torch.device, *, shuffle: bool
) -> tuple[Feed, RaggedBags | StoredBags]:
    """Which bags an epoch of training shows, and in which views; and the clean bags.

    Args:
        device: where batches, and bags in memory, go.
        shuffle: whether the instances of each bag come in a random order.

    Raises:
        InputError: views are asked for and there are none.
    """
    training = torch.from_numpy(data.rows("train"))
    if config.views != "off" and data.stacked is None:
        raise no_views(config, "features")
    if isinstance(data.bags, StoredBags):
        stored = data.bags.to(device=device)
        return Streamed(stored, training, shuffle), stored
    if config.views == "off" or data.stacked is None:
        bags = data.bags.to(device=device)
        return Presentations(bags, training[None], training, shuffle), bags
    stacked = data.stacked.to(device=device)
    augmented = torch.arange(len(data.bags), len(stacked)).view(-1, len(training))
    numbers, rows = torch.cat((training[None], augmented)), training  # (1 + K, T)
    if config.views == "all":
        numbers, rows = numbers.view(1, -1), training.repeat(len(numbers))
    return Presentations(stacked, numbers, rows, shuffle), stacked.first(len(data.bags))


def no_views(config: TrainConfig, where: str) -> InputError:
    """The error for features without augmented views where some are asked for."""
    return InputError(
        where,
        expected=f"augmented views for --views {config.views}",
        got="the clean view only",
        remedy="extract with --views 4 --augment flip,rotate90, say, or train with --views off",
    )


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
            wanted = self.objective.supervision(rows, self.pos_weight, epoch)
            logits, auxiliary = self.model(batch, supervision=wanted)
            loss = wanted.loss(logits)
            total += loss.item() * len(rows)
            optimizer.zero_grad()
            weighted = self.model.aggregator.bag_weight * loss
            (weighted if auxiliary is None else weighted + auxiliary).backward()
            optimizer.step()
        return total / len(self.feed)

    @torch.no_grad()
    def _validate(self, monitored: Monitor) -> dict[Monitor, float]:
        """The loss of the validation bags, and macro F1 if that is monitored."""
        rows = self.data.rows("validation")
        logits = _logits(self.model, in_order(self.bags, torch.from_numpy(rows)))
        wanted = self.objective.supervision(torch.from_numpy(rows), self.pos_weight)
        scores: dict[Monitor, float] = {"loss": float(wanted.loss(logits))}
        if monitored == "f1_macro":
            task = self.data.task
            p = masked(probabilities(logits, task), self.data, self.config, rows)
            found = evaluate(self.data.targets[rows], p, task=task, intervals=0)
            scores["f1_macro"] = found["f1_macro"]
        return scores


def divergence(row: dict[str, float], config: TrainConfig) -> DragnCacheError | None:
    """The error that ends a training whose losses in a row of the history are not finite."""
    if np.isfinite([row["train_loss"], row["validation_loss"]]).all():
        return None
    return DragnCacheError(
        f"epoch {row['epoch']:.0f}",
        expected="a finite loss",
        got=f"training {row['train_loss']:g}, validation {row['validation_loss']:g}",
        remedy=f"lower --lr (now {config.lr:g})",
    )


def positive_weights(
    data: LabelledBags, config: TrainConfig, device: torch.device
) -> Tensor | None:
    """(L,) float32, what ``config.pos_weight`` asks for, or the loss if that asks for nothing.

    A label without a training bag counts as if it had one.

    Raises:
        InputError: it is given for a multi-class task, or the loss cannot be used.
    """
    balanced = create_loss(config.loss, data.task, config.loss_options).balanced
    wanted = "balanced" if config.pos_weight is None and balanced else config.pos_weight
    if wanted is None:
        return None
    if data.task != "multilabel":
        raise InputError(
            "--pos-weight",
            expected="a multi-label task",
            got=data.task,
            remedy="leave it out: classes exclude each other here",
        )
    targets = data.targets[data.rows("train")].astype(np.float32)
    if wanted == "balanced":
        positive = targets.sum(0)
        weights = (len(targets) - positive) / positive.clip(1)
    else:
        weights = np.full(targets.shape[1], wanted, np.float32)
    return torch.from_numpy(weights).to(device)


@torch.no_grad()
def predict(model: BagClassifier, bags: RaggedBags | StoredBags, task: Task) -> NDArray[np.float64]:
    """Probabilities (B, L) of all bags, instances in the manifest's order."""
    return probabilities(_logits(model, in_order(bags)), task)


def probabilities(logits: Tensor, task: Task) -> NDArray[np.float64]:
    """(…, L) of logits (…, L): sigmoids (multi-label) or a softmax (multi-class)."""
    logits = logits.double()
    p = logits.sigmoid() if task == "multilabel" else logits.softmax(-1)
    result: NDArray[np.float64] = p.cpu().numpy()
    return result


def _logits(model: BagClassifier, batches: Iterable[RaggedBags]) -> Tensor:
    model.eval()
    return torch.cat([model(batch)[0] for batch in batches])
