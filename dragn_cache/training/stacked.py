"""Many models of one architecture trained at once, on one reading of every batch.

K configurations that differ in learning rate, weight decay, seed, initialisation, dropout or the
weight of positive targets share the bags, their order and their batches. Their parameters are
stacked (K, …), and each model goes the way that it would go in a training of its own:

- its initialisation and its dropout masks come from its own seed, the order of bags and instances
  from ``shuffle_seed``, which all of them share;
- AdamW's step is taken on the stack, with a learning rate and a weight decay for each model;
- each keeps its own best epoch by validation loss, and one whose loss is no longer finite is
  marked and leaves the others alone.

Where the aggregator is ``stackable``, ``torch.func.vmap`` runs all models in one pass: L1Agg's
products with one vector of weights become products with a matrix, and methods without parameters
are computed once for all. Other aggregators run one after the other on the batch that was gathered
for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.devices import find_device
from dragn_cache.errors import DragnCacheError, InputError
from dragn_cache.loading.feeds import in_order
from dragn_cache.ragged import RaggedBags
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags, fit_aggregator, fit_scaling, present
from dragn_cache.training.model import BagClassifier, build_model, probabilities
from dragn_cache.training.objective import Objective, masked, positive_weights
from dragn_cache.training.start import best_constant, start_at
from dragn_cache.training.train import Trained, divergence, require_room

Epoch = dict[str, float]
ManyProgress = Callable[[list[Epoch | None]], None]
"""Called after every epoch with each model's row of the history; None where it has failed."""

# What may differ in a group. ``seed`` may because ``order_seed`` is compared as well.
OWN = ("lr", "weight_decay", "dropout", "pos_weight", "seed", "shuffle_seed", "intervals")

# What a group cannot do otherwise.
ONLY = {"optimizer": "adamw", "schedule": "none", "patience": 0}


@dataclass(frozen=True)
class Failed:
    """A model whose loss was no longer finite: the error of its own training, its history."""

    error: DragnCacheError
    history: tuple[Epoch, ...]


def train_many(
    data: LabelledBags, configs: Sequence[TrainConfig], *, progress: ManyProgress | None = None
) -> list[Trained | Failed]:
    """Train a model for each configuration, as `train` would, reading each batch once for all.

    Equal to single trainings up to rounding, which is not that of one model: products and sums
    run in another order.

    Args:
        configs: all alike but for ``lr``, ``weight_decay``, ``dropout``, ``pos_weight``, ``seed``,
            ``intervals`` and the option ``init``; different seeds need one ``shuffle_seed``.

    Raises:
        InputError: the configurations differ in anything else, ask for another optimiser than
            AdamW, for a schedule or for early stopping, or for views or weights that the data do
            not have.
    """
    if not configs:
        return []
    require_stackable(configs)
    device = find_device(configs[0].device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return _StackedTraining(data, configs, device).train(progress)


def require_stackable(configs: Sequence[TrainConfig]) -> None:
    """Raise the `InputError` that names what the configurations of a group may not be.

    They may not differ but in what `OWN` lists and in the option ``init``, and must step as
    `StackedAdamW` does, at one learning rate.
    """
    for name, only in ONLY.items():
        value = getattr(configs[0], name)
        if value != only:
            raise InputError(
                "configuration 0 of a group",
                expected=f"{name} {only!r}, which all models can share",
                got=repr(value),
                remedy="train each by itself",
            )
    first = _shared(configs[0])
    for number, config in enumerate(configs):
        for name, value in _shared(config).items():
            if value != first[name]:
                seeds = name == "shuffle_seed"
                raise InputError(
                    f"configuration {number} of a group",
                    expected=f"{name} {first[name]!r}, as in configuration 0",
                    got=repr(value),
                    remedy="give all the same shuffle_seed" if seeds else "train it by itself",
                )


def _shared(config: TrainConfig) -> dict[str, Any]:
    shared = {name: value for name, value in config.to_dict().items() if name not in OWN}
    options = dict(config.options)
    options.pop("init", None)
    return {**shared, "options": options, "shuffle_seed": config.order_seed}


class _StackedTraining:
    """The K models of one `train_many`, and where each of them is."""

    def __init__(
        self, data: LabelledBags, configs: Sequence[TrainConfig], device: torch.device
    ) -> None:
        self.data, self.configs, self.device = data, configs, device
        self.objective = Objective(data, configs[0], device)
        self.models, states = [], []
        for config in configs:
            torch.manual_seed(config.seed)
            model = build_model(config, data.bags.in_shape, data.targets.shape[1], data.task)
            self.models.append(model.to(device))
            states.append(_rng_state(device))
        first = configs[0]
        shuffle = self.models[0].aggregator.order_sensitive and first.order == "random"
        self.feed, self.bags = present(data, first, device, shuffle=shuffle)
        # Scaling is a matter of the training bags: fitted once, applied once for all.
        self.scaling = self.models[0].scaling
        fit_scaling(self.scaling, self.bags, data)
        for model in self.models:
            model.scaling = self.scaling
            fit_aggregator(model, self.bags, data)
            model.scaling = None
        require_room(self.models[0], data, first, models=len(configs))
        self.pos_weight = self._pos_weights()
        rows = torch.from_numpy(data.rows("train"))
        for model, weight in zip(self.models, self._each_pos_weight(), strict=True):
            start_at(model, best_constant(self.objective.supervision(rows, weight, epoch=1)))
        self.stack = _Stack(self.models, states)
        self.histories: list[list[Epoch]] = [[] for _ in configs]
        self.errors: list[DragnCacheError | None] = [None for _ in configs]
        self.best_loss = np.full(len(configs), np.inf)
        self.best_epoch = np.zeros(len(configs), np.int64)
        self.best = {name: x.detach().clone() for name, x in self.stack.state.items()}

    def train(self, progress: ManyProgress | None) -> list[Trained | Failed]:
        config = self.configs[0]
        optimizer = StackedAdamW(
            self.stack.parameters.values(),
            lr=[c.lr for c in self.configs],
            weight_decay=[c.weight_decay for c in self.configs],
        )
        generator = torch.Generator().manual_seed(config.order_seed)
        validation = torch.from_numpy(self.data.rows("validation"))
        for epoch in range(1, config.epochs + 1):
            total = np.zeros(len(self.configs))
            for batch, rows in self.feed.epoch(config.batch_size, generator):
                total += self._step(batch, rows, epoch, optimizer) * len(rows)
            losses = self._losses(self._evaluate(validation), validation)
            self._record(epoch, total / len(self.feed), losses.detach().double().cpu().numpy())
            if progress is not None:
                progress([h[-1] if e is None else None for h, e in self._state()])
            if all(error is not None for error in self.errors):
                break
        return self._results()

    def _step(
        self, batch: RaggedBags, rows: Tensor, epoch: int, optimizer: StackedAdamW
    ) -> NDArray[np.float64]:
        """One step of every model; the losses (K,) before it."""
        self.stack.shell.train()
        width = self.stack.shell.aggregator.out_dim
        masks = torch.stack([m.dropout.draw((len(batch), width)) for m in self.models])
        supervisions = [
            self.objective.supervision(rows, weight, epoch) for weight in self._each_pos_weight()
        ]
        logits, auxiliary = self.stack(self._scaled(batch), masks.to(self.device), supervisions)
        losses = self._losses(logits, rows, epoch)
        optimizer.zero_grad()
        # The gradient of a sum over models is each model's own gradient.
        total = self.stack.shell.aggregator.bag_weight * losses
        total = total if auxiliary is None else total + auxiliary
        torch.autograd.backward(total.sum())
        optimizer.step()
        result: NDArray[np.float64] = losses.detach().double().cpu().numpy()
        return result

    def _losses(self, logits: Tensor, rows: Tensor, epoch: int | None = None) -> Tensor:
        """(K,) of logits (K, b, L) of the bags (b,) in ``rows``; see `Objective`."""

        def one(z: Tensor, weight: Tensor | None) -> Tensor:
            return self.objective.supervision(rows, weight, epoch).loss(z)

        dims = (0, None if self.pos_weight is None else 0)
        losses: Tensor = torch.func.vmap(one, in_dims=dims)(logits, self.pos_weight)
        return losses

    @torch.no_grad()
    def _evaluate(self, numbers: Tensor | None = None) -> Tensor:
        """Logits (K, b, L) of some bags (None: all), instances in the manifest's order."""
        self.stack.shell.eval()
        batches = in_order(self.bags, numbers)
        return torch.cat([self.stack(self._scaled(batch), None)[0] for batch in batches], dim=1)

    def _scaled(self, bags: RaggedBags) -> RaggedBags:
        return bags if self.scaling is None else self.scaling(bags)

    def _pos_weights(self) -> Tensor | None:
        weights = [positive_weights(self.data, c, self.device) for c in self.configs]
        if all(w is None for w in weights):
            return None
        ones = torch.ones(self.data.targets.shape[1], device=self.device)
        return torch.stack([ones if w is None else w for w in weights])

    def _each_pos_weight(self) -> list[Tensor | None]:
        if self.pos_weight is None:
            return [None] * len(self.configs)
        return list(self.pos_weight.unbind())

    def _record(
        self, epoch: int, train: NDArray[np.float64], validation: NDArray[np.float64]
    ) -> None:
        """Write each history on, mark who failed, keep the weights of who became better."""
        for k, (history, error) in enumerate(self._state()):
            if error is not None:
                continue
            row = {
                "epoch": epoch,
                "lr": self.configs[k].lr,
                "train_loss": float(train[k]),
                "validation_loss": float(validation[k]),
            }
            self.errors[k] = divergence(row, self.configs[k])
            if self.errors[k] is None:
                history.append(row)
        running = np.array([error is None for error in self.errors])
        last = self.configs[0].keep == "last"
        better = np.flatnonzero(running & (last | (validation < self.best_loss)))
        self.best_loss[better] = validation[better]
        self.best_epoch[better] = epoch
        for name, x in self.stack.state.items():
            self.best[name][better] = x.detach()[better]

    def _state(self) -> list[tuple[list[Epoch], DragnCacheError | None]]:
        return list(zip(self.histories, self.errors, strict=True))

    def _results(self) -> list[Trained | Failed]:
        with torch.no_grad():
            for name, x in self.stack.state.items():
                x.copy_(self.best[name])
        predicted = probabilities(self._evaluate(), self.data.task)
        predicted = masked(predicted, self.data, self.configs[0])
        results: list[Trained | Failed] = []
        for k, (history, error) in enumerate(self._state()):
            if error is not None:
                results.append(Failed(error, tuple(history)))
                continue
            model = self.models[k]
            with torch.no_grad():
                for name, x in model.state_dict(keep_vars=True).items():
                    x.copy_(self.best[name][k])
            model.scaling = copy.deepcopy(self.scaling)
            epoch = int(self.best_epoch[k])
            results.append(Trained(model.cpu().eval(), epoch, tuple(history), predicted[k]))
        return results


class _Stack:
    """K models as one: RaggedBags → logits (K, B, L).

    Attributes:
        shell: the first model, in which the stack's parameters take their turns.
        parameters, buffers: (K, …) by name; state is both.
    """

    def __init__(self, models: Sequence[BagClassifier], rng_states: list[list[Tensor]]) -> None:
        self.shell, self._rng_states = models[0], rng_states
        self.parameters, self.buffers = torch.func.stack_module_state(list(models))

    @property
    def state(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}

    def __call__(
        self,
        bags: RaggedBags,
        masks: Tensor | None = None,
        supervision: Sequence[Supervision] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (K, B, L) and the auxiliary losses (K,) if there are any.

        ``masks`` (K, B, D) are dropout's, ``supervision`` each model's; None in evaluation.
        """
        if self.shell.aggregator.stackable:
            return self._together(bags, masks), None
        return self._in_turn(bags, masks, supervision)

    def _together(self, bags: RaggedBags, masks: Tensor | None) -> Tensor:
        def one(state: dict[str, Tensor], mask: Tensor | None) -> Tensor:
            logits: Tensor = torch.func.functional_call(self.shell, state, (bags, mask))[0]
            return logits

        dims = (0, None if masks is None else 0)
        logits: Tensor = torch.func.vmap(one, in_dims=dims)(self.state, masks)
        return logits

    def _in_turn(
        self,
        bags: RaggedBags,
        masks: Tensor | None,
        supervision: Sequence[Supervision] | None,
    ) -> tuple[Tensor, Tensor | None]:
        # Unbound at once, so that the gradients are stacked once as well.
        parts = {name: x.unbind(0) for name, x in self.state.items()}
        results = []
        for k in range(len(self._rng_states)):
            _set_rng_state(self._rng_states[k], bags.values.device)
            state = {name: part[k] for name, part in parts.items()}
            given = (
                bags,
                None if masks is None else masks[k],
                None if supervision is None else supervision[k],
            )
            results.append(torch.func.functional_call(self.shell, state, given))
            self._rng_states[k] = _rng_state(bags.values.device)
        losses = [loss for _, loss in results if loss is not None]
        logits = torch.stack([logits for logits, _ in results])
        return logits, torch.stack(losses) if losses else None


class StackedAdamW:
    """``torch.optim.AdamW`` on stacked parameters (K, …), with settings of each model's own.

    A parameter without a gradient is left alone and its step not counted, as there.

    Args:
        lr, weight_decay: K numbers.
    """

    def __init__(
        self, parameters: Any, *, lr: Sequence[float], weight_decay: Sequence[float]
    ) -> None:
        self.parameters = list(parameters)
        self.lr = torch.tensor(lr, dtype=torch.float64)
        self.decay = 1 - self.lr * torch.tensor(weight_decay, dtype=torch.float64)
        self.steps = [0] * len(self.parameters)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        for k, (p, (mean, square)) in enumerate(zip(self.parameters, self.moments, strict=True)):
            if p.grad is None:
                continue
            self.steps[k] += 1
            each = (-1, *[1] * (p.dim() - 1))
            rate = (self.lr / (1 - beta1 ** self.steps[k])).to(p).view(each)
            p.mul_(self.decay.to(p).view(each))
            mean.lerp_(p.grad, 1 - beta1)
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            scale = square.sqrt().div_((1 - beta2 ** self.steps[k]) ** 0.5).add_(eps)
            p.addcdiv_(mean * rate, scale, value=-1)


def _rng_state(device: torch.device) -> list[Tensor]:
    """Of every generator that a model may draw from: the CPU's, and a GPU's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_rng_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
