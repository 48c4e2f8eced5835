"""How training steps: PyTorch's optimisers by name."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from dragn_cache.training.config import TrainConfig


def create_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """``config.optimizer`` on some parameters.

    ``adamw`` decouples weight decay from the gradient; ``adam`` and ``sgd`` add it there.
    """
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return SGD(parameters, lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "adam":
        return Adam(parameters, lr, weight_decay=decay)
    return AdamW(parameters, lr, weight_decay=decay)
