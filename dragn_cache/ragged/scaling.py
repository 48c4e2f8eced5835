"""Scaling of features before they are aggregated, fitted on training bags only."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dragn_cache.ragged.bags import RaggedBags


class Standardise(nn.Module):
    """Subtract each channel's mean and divide by its standard deviation.

    Both are computed by `fit` over its instances (and pixels), and saved with the model. A channel
    that is constant there is only shifted, as by scikit-learn's StandardScaler.

    Attributes:
        mean, std: (C,) float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, bags: RaggedBags) -> None:
        """Compute mean and deviation over the instances of some bags."""
        self.fit_batches([bags])

    @torch.no_grad()
    def fit_batches(self, batches: Iterable[RaggedBags]) -> None:
        """``fit`` to all bags of some batches, in one pass over them."""
        count, mean, variance = 0, *torch.zeros(2, len(self.mean)).to(self.mean).double()
        for bags in batches:
            values = bags.values.float()
            axes = (0, 2, 3) if values.dim() == 4 else (0,)
            moments = torch.var_mean(values, axes, correction=0)
            its_variance, its_mean = (m.double() for m in moments)
            # Chan et al. (1979): each batch around its own mean, so that no large squares cancel.
            count += len(values)
            share = len(values) / count
            shift = its_mean - mean
            mean = mean + share * shift
            variance = variance + share * (its_variance - variance + (1 - share) * shift**2)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(variance > 0, variance.float().sqrt(), 1.0))

    def forward(self, bags: RaggedBags) -> RaggedBags:
        """The same bags in float32, scaled."""
        shape = (-1, 1, 1) if bags.values.dim() == 4 else (-1,)
        scaled = (bags.values.float() - self.mean.view(shape)) / self.std.view(shape)
        return RaggedBags(scaled, bags.offsets)
