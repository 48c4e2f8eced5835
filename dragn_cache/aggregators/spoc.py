"""SPoC: the sum of all local features of a bag, the centre of each map counting most.

"Aggregating Deep Convolutional Features for Image Retrieval" (Babenko and Lempitsky, 2015): a map
(C, h, w) becomes Σ over y, x of g[y, x] · f[:, y, x] with the centre prior
g[y, x] = exp(−((y − c_y)² + (x − c_x)²) / 2σ²), c = ((h − 1)/2, (w − 1)/2) and σ = min(h, w)/6, a
third of the way from the centre to the nearer border; then an L2 norm of one, PCA with whitening,
and an L2 norm of one again. The prior is what the DRAGN paper calls radial basis functions.

- The paper has one image where this has a bag: the maps of all its instances are summed before the
  first normalisation, as the DRAGN paper compares with it.
- The paper's PCA keeps 256 components and comes from other images. Here it is off unless ``whiten``
  says how many, and is fitted on the training bags' descriptors.
- A bag whose features are all 0 has no direction: its sum stays 0 at both normalisations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.declared import SpocOptions
from dragn_cache.errors import InputError
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.segments import segment_sum

# A component with less than this share of the first one's variance is rounding: it becomes 0.
LEAST_VARIANCE = 1e-10


class Spoc(Aggregator, declared="spoc"):
    """Embedding (B, C) or (B, ``whiten``), each row of length 1. No parameters, no attention.

    Args:
        in_shape: (C, h, w), or (C,) for vectors, which are maps of one pixel.
        options: `SpocOptions`.

    Raises:
        InputError: a value that is not allowed, or more components than channels.
    """

    prior: Tensor
    centre: Tensor
    components: Tensor

    options: SpocOptions

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__(in_shape, **options)
        height, width = self.in_shape[1:] or (1, 1)
        weighted, whiten = self.options.spatial_prior, self.options.whiten
        prior = _gaussian(height, width) if weighted else torch.ones(height * width)
        self.register_buffer("prior", prior, persistent=False)
        if whiten is not None:
            _require_components(whiten, at_most=self.in_shape[0], what="channels")
            self.out_dim = whiten
            self.register_buffer("centre", torch.zeros(self.in_shape[0]))
            self.register_buffer("components", torch.eye(whiten, self.in_shape[0]))

    def aggregate(self, bags: RaggedBags) -> Aggregated:
        descriptors = self._descriptors(bags)
        if self.options.whiten is not None:
            descriptors = F.normalize((descriptors - self.centre) @ self.components.T)
        return Aggregated(descriptors, None)

    @torch.no_grad()
    def fit(self, batches: Iterable[RaggedBags]) -> None:
        """Take the principal components of all bags' descriptors, if ``whiten`` asks for some.

        Raises:
            InputError: as many components as bags, or more.
        """
        whiten = self.options.whiten
        if whiten is None:
            return
        from sklearn.decomposition import PCA

        found = torch.cat([self._descriptors(bags) for bags in batches]).cpu().double().numpy()
        _require_components(whiten, at_most=len(found) - 1, what="training bags, less one")
        pca = PCA(whiten, svd_solver="full").fit(found)
        variance = pca.explained_variance_
        told = variance > LEAST_VARIANCE * variance[0]
        scale = np.where(told, 1 / np.sqrt(np.where(told, variance, 1)), 0)
        self.centre.copy_(torch.from_numpy(pca.mean_))
        self.components.copy_(torch.from_numpy(pca.components_ * scale[:, None]))

    def _descriptors(self, bags: RaggedBags) -> Tensor:
        """(B, C): the sum of each bag's local features, of length 1."""
        pooled = self.maps(bags).flatten(2) @ self.prior
        return F.normalize(segment_sum(pooled, bags.offsets))


def _gaussian(height: int, width: int) -> Tensor:
    """(h·w,) row by row: 1 in the centre of the map."""
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    sigma = min(height, width) / 6
    powers = (y[:, None] ** 2 + x**2) / (2 * sigma**2)
    return (-powers).exp().float().flatten()


def _require_components(whiten: int, *, at_most: int, what: str) -> None:
    if whiten > at_most:
        raise InputError(
            "aggregator spoc, option whiten",
            expected=f"at most {at_most} components, the number of {what}",
            got=str(whiten),
            remedy="give fewer, or whiten=none",
        )
