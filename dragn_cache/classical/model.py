"""A classical model: scaling, PCA, encoding and machines, fitted to training bags and applied.

Bags are read in batches, so they may lie in memory or stream from a store. Codebooks, mixtures and
axes come from at most `SAMPLE` training instances, drawn evenly; scaling comes from all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dragn_cache.classical.base import Arrays, ClassicalMethod, principal_axes
from dragn_cache.classical.base import projected as project
from dragn_cache.classical.svm import Examples, MachineChoice, fit_machines, machine_probabilities
from dragn_cache.devices import CPU, free_bytes, memory_for_features
from dragn_cache.errors import InputError
from dragn_cache.loading.feeds import EVALUATION_ROWS, in_order
from dragn_cache.loading.stored import StoredBags
from dragn_cache.ragged import RaggedBags
from dragn_cache.ragged.bags import averaged
from dragn_cache.ragged.codebook import SAMPLE
from dragn_cache.ragged.scaling import Standardise
from dragn_cache.types import Floats, Ints, Task


@dataclass(frozen=True)
class ClassicalModel:
    """Everything that turns bags into probabilities.

    Attributes:
        method: the encoding and its options.
        in_shape: the shape of one instance: (C, h, w) or (C,).
        scaling: of the features, or None.
        pca, encoding, machines: the fitted arrays, float64.
    """

    method: ClassicalMethod
    in_shape: tuple[int, ...]
    scaling: Standardise | None
    pca: Arrays
    encoding: Arrays
    machines: Arrays

    def encode(
        self, bags: RaggedBags | StoredBags, numbers: Tensor | None = None
    ) -> Iterator[Floats]:
        """Some bags (None: all) as vectors, batch after batch (b, E).

        Raises:
            InputError: a bag is empty, or instances have another shape.
        """
        for instances, offsets in _batches(bags, numbers, self.scaling, self.in_shape):
            yield self.method.encode(self.encoding, project(self.pca, instances), offsets)

    def predict(self, bags: RaggedBags | StoredBags, task: Task) -> Floats:
        """Probabilities (B, L) of all bags."""
        batches = [machine_probabilities(self.machines, x, task) for x in self.encode(bags)]
        return np.concatenate(batches)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything fitted, as tensors by name."""
        kinds = {"pca": self.pca, "encoding": self.encoding, "machines": self.machines}
        state = {
            f"{kind}.{name}": torch.from_numpy(np.array(array))
            for kind, arrays in kinds.items()
            for name, array in arrays.items()
        }
        if self.scaling is not None:
            state |= {f"scaling.{name}": v for name, v in self.scaling.state_dict().items()}
        return state

    @classmethod
    def from_state(
        cls, method: ClassicalMethod, in_shape: tuple[int, ...], state: Mapping[str, Tensor]
    ) -> ClassicalModel:
        """The model of a `state_dict`.

        Raises:
            LookupError, RuntimeError, ValueError: the state is of another model.
        """
        parts: dict[str, Arrays] = {"pca": {}, "encoding": {}, "machines": {}, "scaling": {}}
        for name, tensor in state.items():
            kind, _, array = name.partition(".")
            parts[kind][array] = tensor.numpy()
        scaling = None
        if parts["scaling"]:
            scaling = Standardise(in_shape[0])
            scaling.load_state_dict({k: torch.from_numpy(v) for k, v in parts["scaling"].items()})
        model = cls(method, in_shape, scaling, parts["pca"], parts["encoding"], parts["machines"])
        one = RaggedBags(torch.zeros(1, *in_shape), torch.tensor([0, 1]))
        model.predict(one, "multilabel")  # raises here if arrays do not fit each other
        return model


def fit_model(
    method: ClassicalMethod,
    bags: RaggedBags | StoredBags,
    targets: np.ndarray,
    training: Ints,
    validation: Ints,
    *,
    groups: Sequence[str],
    scaling: Standardise | None,
    weights: Sequence[float],
    seed: int,
) -> tuple[ClassicalModel, list[MachineChoice]]:
    """Fit a method: words, axes and machines to the training bags, judged by validation bags.

    Args:
        bags: all B bags.
        targets: (B, L) of 0 and 1.
        training, validation: numbers of those bags.
        groups: names for all B bags; an empty one is a group of its own.
        scaling: fitted already, or None.
        weights: L, weight of a positive bag relative to a negative one.
        seed: of sample, words and folds.

    Raises:
        InputError: too few instances for the words or axes, or too little memory for the vectors.
    """
    pca: Arrays = {}
    encoding: Arrays = {}
    if method.learns or method.pca is not None:
        instances = sampled(bags, training, scaling, seed)
        pca = {} if method.pca is None else principal_axes(instances, method.pca)
        encoding = method.fit(project(pca, instances), seed)
        del instances
    model = ClassicalModel(method, bags.in_shape, scaling, pca, encoding, {})
    require_room_to_encode(method, bags.in_shape[0], bags.offsets.diff(), free=free_bytes(CPU))
    rows = np.concatenate([training, validation])
    _require_memory(model, len(rows), len(training))
    encoded = np.concatenate(list(model.encode(bags, torch.from_numpy(rows))))
    examples = Examples(encoded, targets[rows], tuple(groups[k] for k in training))
    machines, choices = fit_machines(examples, method, weights, seed)
    return ClassicalModel(method, bags.in_shape, scaling, pca, encoding, machines), choices


def sampled(
    bags: RaggedBags | StoredBags, training: Ints, scaling: Standardise | None, seed: int
) -> Floats:
    """(n, C): the training bags' instances, or `SAMPLE` of them if there are more."""
    total = int(bags.offsets.diff()[torch.from_numpy(training)].sum())
    kept = np.ones(total, bool)
    if total > SAMPLE:
        kept[:] = False
        kept[np.random.default_rng(seed).choice(total, SAMPLE, replace=False)] = True
    batches, start = [], 0
    for instances, _ in _batches(bags, torch.from_numpy(training), scaling, bags.in_shape):
        batches.append(instances[kept[start : start + len(instances)]])
        start += len(instances)
    return np.concatenate(batches)


def _batches(
    bags: RaggedBags | StoredBags,
    numbers: Tensor | None,
    scaling: Standardise | None,
    in_shape: tuple[int, ...],
) -> Iterator[tuple[Floats, Ints]]:
    """Scaled instances (n, C), averaged over h and w, and offsets (b + 1,) of some bags."""
    if bags.in_shape != in_shape:
        raise InputError(
            "bags",
            expected=f"instances of shape {in_shape}",
            got=str(bags.in_shape),
            remedy="use the tap that the model was fitted on",
        )
    if bool((bags.offsets.diff() == 0).any()):
        raise InputError(
            "bags",
            expected="at least one instance in each",
            got="an empty bag",
            remedy="leave bags without usable instances out with select",
        )
    for batch in in_order(bags.to(device=CPU), numbers):
        values = (batch if scaling is None else scaling(batch)).values
        values = averaged(values, torch.float64) if values.dim() == 4 else values.double()
        yield values.numpy(), batch.offsets.numpy()


def require_room_to_encode(
    method: ClassicalMethod, channels: int, sizes: Tensor, *, free: float
) -> None:
    """Raise `InputError` unless the longest of some bags (B,) can be encoded in ``free`` bytes."""
    longest = int(sizes.max())
    rows = longest + min(int(sizes.sum()) - longest, EVALUATION_ROWS)
    needed = 8 * rows * (2 * channels + method.row_values(method.pca or channels))
    if needed > free:
        raise InputError(
            f"aggregator {method.name}",
            expected=f"about {needed / 1e9:.3g} GB of memory to encode the longest bag, of "
            f"{longest:,} instances",
            got=f"{free / 1e9:.3g} GB that are free",
            remedy="give the option pca=16, say, or fewer words; or cut the bag into several, or "
            "free memory",
        )


KERNELS = 4  # matrices in memory at once: products, a kernel, its argument, a machine's rows


def _require_memory(model: ClassicalModel, bags: int, training: int) -> None:
    """Raise `InputError` unless the encoded bags, twice, and their kernels fit into memory."""
    width = model.in_shape[0] if not model.pca else len(model.pca["axes"])
    width = model.method.encode(model.encoding, np.zeros((1, width)), np.array([0, 1])).shape[1]
    needed = 8 * bags * (2 * width + KERNELS * training)
    free = memory_for_features("auto", CPU)
    if needed > free:
        raise InputError(
            f"aggregator {model.method.name}",
            expected=f"vectors and kernels of {bags} bags in {free / 1e9:.3g} GB of memory",
            got=f"{needed / 1e9:.3g} GB for {width} numbers a bag",
            remedy="give the option pca=64, say, fewer words, or fewer bags",
        )
