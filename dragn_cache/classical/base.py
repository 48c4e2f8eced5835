"""The base of classical methods: options, ``fit`` to instances, ``encode`` for bags.

A method encodes a bag as one vector, on which support vector machines decide (`svm`). It is a
frozen set of options and has no state: ``fit`` gives arrays for training instances, ``encode``
gives vectors for arrays and instances. All numbers are float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from dragn_cache.classical.declared import ClassicalOptions, Normalise, WordOptions
from dragn_cache.errors import InputError
from dragn_cache.types import Floats, Ints

Arrays = dict[str, Floats]

MOST_WORDS = 64
INSTANCES_PER_WORD = 10  # at the least, where the number of words is not given


class ClassicalMethod(ClassicalOptions, ABC):
    """An encoding of bags, and the settings of its support vector machines.

    A subclass derives from its options in `declared` as well. Maps are averaged over h and w first.

    Class attributes:
        name: as it is registered.
        learns: whether ``fit`` looks at instances.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = True

    def refused(self, option: str, expected: str, got: str, remedy: str) -> InputError:
        """The error for a value of an option that cannot be used."""
        return InputError(
            f"aggregator {self.name}, option {option}", expected=expected, got=got, remedy=remedy
        )

    @abstractmethod
    def fit(self, instances: Floats, seed: int) -> Arrays:
        """The arrays of the encoding, from training instances (N, D)."""

    def row_values(self, width: int) -> int:
        """Numbers that ``encode`` makes of each instance, which has ``width``, at its peak."""
        return 3 * width

    @abstractmethod
    def encode(self, arrays: Arrays, instances: Floats, offsets: Ints) -> Floats:
        """Bags as vectors (B, E).

        Args:
            arrays: the result of ``fit``.
            instances: (N, D).
            offsets: (B + 1,): bag b has the rows ``offsets[b] : offsets[b + 1]``, at least one.
        """


class WordMethod(WordOptions, ClassicalMethod):
    """A method with a vocabulary of ``words``, K."""

    def row_values(self, width: int) -> int:
        """Those of the instance, and of its place among the words."""
        return 5 * width + 4 * (self.words or MOST_WORDS)

    def count(self, instances: Floats) -> int:
        """K for these training instances (N, D).

        Raises:
            InputError: fewer instances than words are distinct.
        """
        words = max(2, min(MOST_WORDS, len(instances) // INSTANCES_PER_WORD))
        words = words if self.words is None else self.words
        rows = np.ascontiguousarray(instances)
        distinct = len(np.unique(rows.view(np.dtype((np.void, rows.strides[0])))))
        if distinct < words:
            expected = f"at most the number of distinct training instances, {distinct}"
            raise self.refused("words", expected, str(words), "give fewer, or more training bags")
        return words


def segment_sum(values: Floats, offsets: Ints) -> Floats:
    """(N, …) → (B, …): the sum of each bag's rows; no bag is empty."""
    result: Floats = np.add.reduceat(values, offsets[:-1], axis=0)
    return result


def owners(offsets: Ints) -> Ints:
    """(N,): the bag of each row."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def normalised(encoded: Floats, kind: Normalise) -> Floats:
    """Encoded bags (B, K, D) or (B, E) as rows (B, E), normalised.

    ``l1`` and ``l2`` divide by a bag's norm; ``power`` takes sign(x)√|x| before ``l2``; ``intra``
    divides each word's part by its own norm before ``l2``. Vectors of zeros stay as they are.
    """
    if kind == "power":
        encoded = np.sign(encoded) * np.sqrt(np.abs(encoded))
    elif kind == "intra":
        encoded = _divided(encoded, 2)
    rows = encoded.reshape(len(encoded), -1)
    return rows if kind == "none" else _divided(rows, 1 if kind == "l1" else 2)


def _divided(values: Floats, order: int) -> Floats:
    norms = np.linalg.norm(values, ord=order, axis=-1, keepdims=True)
    divided: Floats = np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)
    return divided


def principal_axes(instances: Floats, count: int) -> Arrays:
    """Mean (D,) and the ``count`` axes (count, D) of largest variance of instances (N, D).

    Raises:
        InputError: the instances have fewer axes.
    """
    most = min(instances.shape[1], len(instances) - 1)
    if count > most:
        raise InputError(
            "option pca",
            expected=f"at most {most} axes of {len(instances)} training instances with "
            f"{instances.shape[1]} channels",
            got=str(count),
            remedy="give fewer",
        )
    mean = instances.mean(0)
    centred = instances - mean
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :count].T
    # The sign of an axis is arbitrary: its largest entry is made positive.
    largest = np.abs(axes).argmax(1)
    signs = np.sign(np.take_along_axis(axes, largest[:, None], 1))
    return {"mean": mean, "axes": np.ascontiguousarray(axes * signs)}


def projected(pca: Arrays, instances: Floats) -> Floats:
    """Instances (N, D) on the axes of `principal_axes`, (N, count); as they are without any."""
    if not pca:
        return instances
    result: Floats = (instances - pca["mean"]) @ pca["axes"].T
    return result


def seed_of(seed: int) -> int:
    """A seed as scikit-learn takes it, below 2³²."""
    return seed % 2**32
