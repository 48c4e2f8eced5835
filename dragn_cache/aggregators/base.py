"""The base class of aggregators: RaggedBags in, one embedding per bag out.

A new aggregator is one file with a subclass of ``Aggregator`` that writes ``aggregate``, and its
entry in `declared`; the checks, the conversion of stored fp16 features and the pooling of maps
live here, so that no method can forget them. What a method may write besides:

- ``supervised``, where training adds losses of its own to the bag's (CLAM, DSMIL);
- ``head``, where its classifier is not one linear layer on the embedding;
- ``label_biases``, where it has classifiers inside that are compared with the labels;
- ``fit``, where something comes from the training bags before training (a codebook, a PCA).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dragn_cache.aggregators.declared import (
    AGGREGATORS,
    BLOCK_ROWS,
    OF_OTHERS,
    Need,
    Needs,
    NoOptions,
)
from dragn_cache.aggregators.supervision import Supervision
from dragn_cache.errors import InputError
from dragn_cache.named import make
from dragn_cache.options import Settings
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import averaged


class Aggregated(NamedTuple):
    """The result of an aggregator for B bags with N instances in total.

    Attributes:
        embedding: (B, D), one row per bag.
        attention: weight of each instance, in the order of the rows: (N,), or (N, L) where each
            label has its own; None where the method has none.
        loss: scalar auxiliary loss, to be added to the bags' own; None where there is none.
    """

    embedding: Tensor
    attention: Tensor | None
    loss: Tensor | None = None


class Aggregator(nn.Module, ABC):
    """Base of all aggregators. Law: in evaluation mode no bag's output depends on its batch mates.

    A registered method names its entry in `declared`, as in ``class Abmil(Aggregator,
    declared="abmil")``, and has options and the attributes of its class from there. A class of
    one's own writes ``needs`` and ``order_sensitive``; its options are keyword-only arguments.

    Class attributes:
        needs: the kind of tap it is meant for: "map", "vector", or "any" where a map and its
            average give the same result. Either kind is accepted by ``vectors`` and ``maps``.
        order_sensitive: whether the order of the instances changes the result. An object may
            differ from its class by an option.
        has_attention: whether ``Aggregated.attention`` is given.
        name: as it is registered; that of the class where it is not.
        options_class: the settings that its options are.
        embedding_among_features: whether the embedding lies in the space of the instances'
            vectors, a bag of one instance having that instance's, so that the cosine between an
            instance and its bag says how much of it the aggregation kept.
        need: how much memory its layers' values take.

    Attributes:
        in_shape: (C, h, w) or (C,), the shape of one instance.
        options: what it was made with, all of it, checked.
        out_dim: D, the width of the embedding; C unless a method sets another.
        bag_weight: what the loss of the bags' logits counts in training, beside the auxiliary one.
    """

    needs: ClassVar[Needs]
    order_sensitive: bool
    has_attention: ClassVar[bool] = False
    name: ClassVar[str]
    options_class: ClassVar[type[Settings]] = NoOptions
    options: Settings
    embedding_among_features: ClassVar[bool] = False
    need: ClassVar[Need] = OF_OTHERS
    out_dim: int
    bag_weight: float = 1.0

    def __init_subclass__(cls, *, declared: str | None = None, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.name = declared or cls.__name__
        if declared is not None:
            method = AGGREGATORS[declared]
            cls.options_class, cls.needs = method.options, method.needs
            cls.order_sensitive, cls.has_attention = method.order_sensitive, method.has_attention
            cls.embedding_among_features = method.embedding_among_features
            cls.need = method.need

    def __init__(self, in_shape: Sequence[int], **options: Any) -> None:
        super().__init__()
        self.in_shape = _require_shape(in_shape)
        self.options = make(f"aggregator {self.name}", self.options_class, options)
        self.out_dim = self.in_shape[0]
        # Empty, but it follows .to(), .double() and .half() as parameters do, so that methods
        # without parameters have a dtype to compute in as well.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self._anchor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, which features are converted to: float32 unless changed."""
        return self._anchor.dtype

    def forward(self, bags: RaggedBags, supervision: Supervision | None = None) -> Aggregated:
        """Aggregate B bags of ``in_shape`` instances, each bag with at least one.

        Args:
            supervision: what the bags should become; given in training only.

        Raises:
            InputError: no bags, instances of another shape, an empty bag, or a method that gives
                something else than one embedding per bag.
        """
        self._require_fitting(bags)
        result = self.aggregate(bags) if supervision is None else self.supervised(bags, supervision)
        self._require_result(result, len(bags))
        return result

    def head(self, labels: int) -> nn.Module:
        """A fresh classifier: embeddings (B, D) to logits (B, L)."""
        return nn.Linear(self.out_dim, labels)

    def label_biases(self) -> Sequence[Tensor]:
        """Biases, besides the head's, of logits that training compares with the bags' labels.

        Each is (L,), or (K · L,) where a label has K neighbours. They start at the labels'
        frequency, as the head's does; see `training.start`.
        """
        return ()

    def fit(self, batches: Iterable[RaggedBags]) -> None:
        """Take from all training bags, once before training, what is not learned by gradients."""

    def needed_bytes(self, sizes: Sequence[int], *, training: bool) -> int:
        """About the bytes that a batch of bags of these sizes takes at its peak, copies of its
        features included; rather too many than too few."""
        rows, need = sum(sizes), self.need
        if training and need.blocks is not None and rows > BLOCK_ROWS:
            values = need.training * BLOCK_ROWS + need.blocks * rows
            values *= self.row_values(training=training)
        else:
            values = sum(self.bag_values(n, training=training) for n in sizes)
        features = 2 * math.prod(self.in_shape) * rows
        return int((values + features) * self.dtype.itemsize)

    def bag_values(self, n: int, *, training: bool) -> float:
        """The values that its layers, and what it does with them, make of a bag of n instances."""
        need = self.need.training if training else self.need.evaluation
        return need * n * self.row_values(training=training)

    def row_values(self, *, training: bool) -> float:
        """The values that its layers make of an instance: the sum of their widths."""
        return sum(p.shape[0] for p in self.parameters() if p.dim() > 1)

    def quadratic_seconds(self, n: int) -> float:
        """About the seconds that a training step takes for a bag of n instances on one core, of a
        method whose cost is quadratic; 0 for others."""
        return 0.0

    @property
    def stackable(self) -> bool:
        """Whether ``torch.func.vmap`` over the parameters trains many of it at once.

        It does where every operation is PyTorch's or brings a rule for vmap, nothing random or in
        place happens in training, and there is no auxiliary loss. False costs time only.
        """
        return False

    @abstractmethod
    def aggregate(self, bags: RaggedBags) -> Aggregated:
        """``forward`` on bags that are known to fit."""

    def supervised(self, bags: RaggedBags, supervision: Supervision) -> Aggregated:
        """``aggregate`` in training, with the auxiliary loss where the method has one."""
        return self.aggregate(bags)

    def vectors(self, bags: RaggedBags) -> Tensor:
        """(N, C) in ``dtype``: the instances' vectors; maps are averaged over h and w (GAP)."""
        values = bags.values
        if values.dim() == 4:
            return averaged(values, self.dtype)
        return values.to(self.dtype)

    def maps(self, bags: RaggedBags) -> Tensor:
        """(N, C, h, w) in ``dtype``: the instances' maps; vectors are maps of one pixel."""
        values = bags.values.to(self.dtype)
        return values if values.dim() == 4 else values[:, :, None, None]

    def _require_fitting(self, bags: RaggedBags) -> None:
        if bags.in_shape != self.in_shape:
            raise InputError(
                f"aggregator {self.name}",
                expected=f"instances of shape {self.in_shape}",
                got=f"{bags.in_shape}",
                remedy="use the tap it was made for, or make it with the in_shape of these bags",
            )
        if len(bags) == 0:
            raise InputError(
                f"aggregator {self.name}",
                expected="at least one bag",
                got="a batch without bags",
                remedy="leave out empty batches",
            )
        empty = np.flatnonzero(np.diff(bags.offsets.numpy()) == 0)
        if len(empty):
            raise InputError(
                f"aggregator {self.name}, bag {int(empty[0])} of the batch",
                expected="at least one instance",
                got="an empty bag",
                remedy="leave bags without usable instances out with select",
            )

    def _require_result(self, result: object, bags: int) -> None:
        """Raise an InputError for a result that a head or a loss would fail on."""
        shape = (bags, self.out_dim)
        if not isinstance(result, Aggregated):
            got = f"a {type(result).__name__}"
        elif result.embedding.shape != shape:
            got = f"one of shape {tuple(result.embedding.shape)}"
        else:
            return
        raise InputError(
            f"aggregator {self.name}",
            expected=f"Aggregated with an embedding of shape {shape}, bags × out_dim",
            got=got,
            remedy="correct its aggregate, or the out_dim that it sets",
        )


def _require_shape(in_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(in_shape)
    if len(shape) not in (1, 3) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(
            "aggregator, in_shape",
            expected="(C, h, w) or (C,), whole numbers above 0",
            got=repr(shape),
            remedy="take it from RaggedBags.in_shape or from the store's tap",
        )
    return shape
