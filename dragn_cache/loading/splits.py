"""Train, validation and test splits that keep groups whole and labels balanced.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label
data", ECML PKDD 2011, algorithm 1), applied to groups of bags instead of single examples:

- a group's label vector is the sum over its bags, and it moves as a whole;
- among groups that wait for the same label, larger ones go first, while there is room to even out;
- a fold that has its bags takes no more while another has room, so sizes hold as well as balance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.types import SPLITS, Floats, Ints

# The paper's "5:4:1" as its code has it.
FRACTIONS: Mapping[str, float] = MappingProxyType({"test": 0.5, "train": 0.4, "validation": 0.1})


def normalise_split_name(name: str) -> str:
    """The one name of a split: ``train``, ``validation`` (also given as ``val``) or ``test``.

    Raises:
        UnknownNameError: it is none of them.
    """
    if name == "val":
        return "validation"
    if name not in SPLITS:
        raise UnknownNameError("split", name, SPLITS)
    return name


def make_split(
    bag_ids: Sequence[str],
    labels: ArrayLike,
    groups: Sequence[str],
    *,
    fractions: Mapping[str, float] = FRACTIONS,
    seed: int,
) -> list[str]:
    """Assign every bag to a split: groups whole, labels balanced, whatever the order of the bags.

    Args:
        bag_ids: B distinct ids.
        labels: (B, L) of 0 and 1.
        groups: B group names; an empty one means that the bag is a group of its own.
        fractions: share of the bags in each split that is wanted; they add up to 1.
        seed: seed of everything that is left to chance.

    Returns:
        the split's name for each bag, in the order given.

    Raises:
        InputError: arguments do not fit each other, an id occurs twice, or there are fewer groups
            than splits.
        UnknownNameError: ``fractions`` names another split.
    """
    shares = {normalise_split_name(name): share for name, share in fractions.items()}
    names = sorted(shares)
    _require_lengths(bag_ids, groups=groups)
    _require_distinct(bag_ids)
    table = _require_labels(labels, len(bag_ids))
    order = sorted(range(len(bag_ids)), key=lambda i: bag_ids[i])
    folds = stratified_folds(
        table[order], [groups[i] for i in order], [shares[name] for name in names], seed=seed
    )
    splits = [""] * len(order)
    for i, fold in zip(order, folds, strict=True):
        splits[i] = names[fold]
    return splits


def make_folds(
    bag_ids: Sequence[str],
    labels: ArrayLike,
    groups: Sequence[str],
    *,
    folds: int,
    seed: int,
) -> Ints:
    """Folds of equal size for cross-validation, whatever the order of the bags.

    Args:
        bag_ids: B distinct ids.
        labels: (B, L) of 0 and 1.
        groups: B group names; an empty one means that the bag is a group of its own.
        folds: K, how many.
        seed: seed of everything that is left to chance.

    Returns:
        (B,) int64, the fold of each bag, 0 to K - 1, as `stratified_folds` gives it.

    Raises:
        InputError: arguments do not fit each other, an id occurs twice, or there are fewer groups
            than folds.
    """
    _require_lengths(bag_ids, groups=groups)
    _require_distinct(bag_ids)
    table = _require_labels(labels, len(bag_ids))
    order = sorted(range(len(bag_ids)), key=lambda i: bag_ids[i])
    sorted_folds = stratified_folds(
        table[order], [groups[i] for i in order], [1 / folds] * folds, seed=seed
    )
    result = np.empty(len(order), np.int64)
    result[order] = sorted_folds
    return result


def stratified_folds(
    labels: ArrayLike, groups: Sequence[str], fractions: Sequence[float], *, seed: int
) -> Ints:
    """Divide bags into K folds: groups whole, each label spread as the fractions ask.

    The result depends on the order of the bags; `make_split` sorts them by id first. For k-fold
    cross-validation the fractions are K times 1/K. Without groups each fold has exactly its share
    of the bags, rounded; otherwise it exceeds that by less than the largest group. No fold is empty
    (when groups are so few that this needs it, the sizes give way).

    Args:
        labels: (B, L) of 0 and 1; L may be 0.
        groups: B group names; an empty one means that the bag is a group of its own.
        fractions: K shares, each above 0, that add up to 1.
        seed: seed of the order among equals.

    Returns:
        (B,) int64, the fold of each bag, 0 to K - 1.

    Raises:
        InputError: arguments do not fit each other, or there are fewer groups than folds.
    """
    table = _require_labels(labels, len(groups))
    shares = _require_fractions(fractions)
    # The key keeps a bag without a group apart from every named group.
    keys: list[tuple[str, int]] = [(name, -1) if name else ("", i) for i, name in enumerate(groups)]
    index: dict[tuple[str, int], int] = {}
    member = np.array([index.setdefault(key, len(index)) for key in keys], dtype=np.int64)
    if len(index) < len(shares):
        raise InputError(
            "split",
            expected=f"at least one group of bags for each of {len(shares)} folds",
            got=f"{len(index)} groups ({len(groups)} bags)",
            remedy="give more bags or groups, or ask for fewer folds",
        )
    sizes = np.bincount(member, minlength=len(index))
    positives = np.zeros((len(index), table.shape[1]), dtype=np.int64)
    np.add.at(positives, member, table)
    return _Stratifier(sizes, positives, shares, np.random.default_rng(seed)).run()[member]


def require_split(bag_ids: Sequence[str], splits: Sequence[str], groups: Sequence[str]) -> None:
    """Raise unless a split can be trained and tested on without a leak.

    Args:
        bag_ids: B distinct ids.
        splits: B names out of train, validation and test.
        groups: B group names; an empty one means none.

    Raises:
        InputError: lengths differ, an id occurs twice, a split has another name or is empty, or a
            group has bags in more than one split.
    """
    _require_lengths(bag_ids, splits=splits, groups=groups)
    _require_distinct(bag_ids)
    split_of_group: dict[str, str] = {}
    for bag_id, split, group in zip(bag_ids, splits, groups, strict=True):
        if split not in SPLITS:
            raise InputError(
                f"split of bag {bag_id!r}",
                expected="train, validation or test",
                got=repr(split),
                remedy="correct the split column, or leave it out to have one made",
            )
        other = split_of_group.setdefault(group, split) if group else split
        if other != split:
            raise InputError(
                f"group {group!r}",
                expected="all its bags in one split",
                got=f"bags in {other} and in {split} ({bag_id!r})",
                remedy="put the whole group into one split",
            )
    empty = [name for name in SPLITS if name not in splits]
    if empty:
        raise InputError(
            "split",
            expected="bags in each of train, validation and test",
            got=f"none in {' and none in '.join(empty)}",
            remedy="move bags into it, or leave the split out to have one made",
        )


class _Stratifier:
    """Iterative stratification of G groups into K folds.

    Args:
        sizes: (G,) number of bags.
        positives: (G, L) number of bags that carry each label.
        shares: (K,) fractions.
        rng: decides among equals.
    """

    def __init__(
        self, sizes: Ints, positives: Ints, shares: Floats, rng: np.random.Generator
    ) -> None:
        self.sizes, self.positives, self.rng = sizes, positives, rng
        self.bags_missing = _apportion(int(sizes.sum()), shares)
        self.labels_missing = np.outer(shares, positives.sum(axis=0))
        self.fold = np.full(len(sizes), -1, dtype=np.int64)
        self.empty = np.full(len(shares), True)
        self.waiting = len(sizes)
        shuffled = rng.permutation(len(sizes))
        self.order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]

    def run(self) -> Ints:
        """(G,) the fold of each group. The rarest label goes first, groups without any last."""
        while True:
            left = self.fold < 0
            carriers = (self.positives[left] > 0).sum(axis=0)
            if not carriers.any():
                break
            label = int(np.where(carriers > 0, carriers, len(left) + 1).argmin())
            for group in self.order[(left & (self.positives[:, label] > 0))[self.order]]:
                self._place(group, self.labels_missing[:, label])
        for group in self.order[(self.fold < 0)[self.order]]:
            self._place(group, self.bags_missing)
        return self.fold

    def _place(self, group: int, need: NDArray[Any]) -> None:
        """Put a group into the fold of greatest need, then of most missing bags, then by chance.

        Args:
            need: (K,) how many bags of a label, or of any, each fold still lacks.
        """
        # While bags are left some fold has room; the last groups are kept for folds without any.
        open_folds = self.bags_missing > 0 if self.waiting > self.empty.sum() else self.empty
        keys = (self.rng.random(len(self.empty)), self.bags_missing, need, open_folds)
        best = int(np.lexsort(keys)[-1])
        self.fold[group] = best
        self.empty[best] = False
        self.waiting -= 1
        self.bags_missing[best] -= self.sizes[group]
        self.labels_missing[best] -= self.positives[group]


def _apportion(bags: int, shares: Floats) -> Ints:
    """Whole numbers that add up to ``bags``, by largest remainder."""
    exact = shares * bags
    whole = np.floor(exact).astype(np.int64)
    most_cut = np.argsort(whole - exact, kind="stable")[: bags - int(whole.sum())]
    whole[most_cut] += 1
    return whole


def _require_labels(labels: ArrayLike, bags: int) -> Ints:
    table = np.asarray(labels)
    if table.ndim != 2 or len(table) != bags or table.dtype.kind not in "buif":
        raise InputError(
            "labels",
            expected=f"numbers of shape ({bags}, labels)",
            got=f"{table.dtype} of shape {table.shape}",
            remedy="give one row per bag and one column per label",
        )
    wrong = (table != 0) & (table != 1)
    if wrong.any():
        bag, label = np.argwhere(wrong)[0]
        raise InputError(
            f"labels, bag {bag}, label {label}",
            expected="0 or 1",
            got=str(table[bag, label]),
            remedy="encode each label as 0 or 1",
        )
    return table.astype(np.int64)


def _require_fractions(fractions: Sequence[float]) -> Floats:
    shares = np.asarray(fractions, dtype=np.float64)
    if not shares.size or not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise InputError(
            "fractions",
            expected="numbers above 0 that add up to 1",
            got=str(shares.tolist()),
            remedy="correct the fractions; leave out a split that is not wanted",
        )
    normalised: Floats = shares / shares.sum()
    return normalised


def _require_lengths(bag_ids: Sequence[str], **columns: Sequence[str]) -> None:
    for name, column in columns.items():
        if len(column) != len(bag_ids):
            raise InputError(
                name,
                expected=f"one for each of {len(bag_ids)} bags",
                got=str(len(column)),
                remedy="give one entry per bag",
            )


def _require_distinct(bag_ids: Sequence[str]) -> None:
    seen: set[str] = set()
    for bag_id in bag_ids:
        if bag_id in seen:
            raise InputError(
                f"bag {bag_id!r}",
                expected="each bag once",
                got="the same id twice",
                remedy="remove the duplicate",
            )
        seen.add(bag_id)
