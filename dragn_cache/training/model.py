"""A bag classifier: aggregator, dropout and head; its predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dragn_cache.aggregators import Aggregator, create_aggregator, options_of
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.loading.feeds import in_order
from dragn_cache.loading.stored import StoredBags
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.scaling import Standardise
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.methods import SUPPLIED
from dragn_cache.types import Task


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


def build_model(
    config: TrainConfig, in_shape: tuple[int, ...], n_labels: int, task: Task = "multilabel"
) -> BagClassifier:
    """A fresh model for instances of ``in_shape``.

    An aggregator with an option ``labels`` or ``task`` is told these.
    """
    options = dict(config.options)
    known = dict(zip(SUPPLIED, (n_labels, task), strict=True))
    for option in options.keys() & known.keys():
        raise InputError(
            f"{config.aggregator}, option {option}",
            expected="no value: it is the data's",
            got=repr(options[option]),
            remedy="leave it out",
        )
    taken = options_of(config.aggregator)
    options |= {option: value for option, value in known.items() if option in taken}
    aggregator = create_aggregator(config.aggregator, in_shape=in_shape, **options)
    scaling = Standardise(in_shape[0]) if config.scale == "standard" else None
    return BagClassifier(
        aggregator, n_labels, dropout=config.dropout, seed=config.seed, scaling=scaling
    )


@torch.no_grad()
def predict(model: BagClassifier, bags: RaggedBags | StoredBags, task: Task) -> NDArray[np.float64]:
    """Probabilities (B, L) of all bags, instances in the manifest's order."""
    return probabilities(logits_of(model, in_order(bags)), task)


def probabilities(logits: Tensor, task: Task) -> NDArray[np.float64]:
    """(…, L) of logits (…, L): sigmoids (multi-label) or a softmax (multi-class)."""
    logits = logits.double()
    p = logits.sigmoid() if task == "multilabel" else logits.softmax(-1)
    result: NDArray[np.float64] = p.cpu().numpy()
    return result


def logits_of(model: BagClassifier, batches: Iterable[RaggedBags]) -> Tensor:
    model.eval()
    return torch.cat([model(batch)[0] for batch in batches])
