"""What a step minimises: the loss of the bags, masked and weighted."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import SettingError
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.losses import create_loss


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
            raise SettingError(
                "stage_mask",
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
        raise SettingError(
            "pos_weight",
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
