"""Scaling of features before they are aggregated, fitted on training bags only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dragn_cache.bags import RaggedBags


class Standardise(nn.Module):
    """Subtract each channel's mean and divide by its standard deviation.

    Both are taken over the instances (and pixels) that `fit` sees, and stay with the model. A
    channel that never varied there is only shifted, as scikit-learn's StandardScaler does.

    Attributes:
        mean, std: (C,) float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @torch.no_grad()
    def fit(self, bags: RaggedBags) -> None:
        """Take mean and deviation from the instances of some bags."""
        values = bags.values.float()
        axes = (0, 2, 3) if values.dim() == 4 else (0,)
        variance, mean = torch.var_mean(values, axes, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(variance > 0, variance.sqrt(), 1.0))

    def forward(self, bags: RaggedBags) -> RaggedBags:
        """The same bags in float32, scaled."""
        shape = (-1, 1, 1) if bags.values.dim() == 4 else (-1,)
        scaled = (bags.values.float() - self.mean.view(shape)) / self.std.view(shape)
        return RaggedBags(scaled, bags.offsets)
