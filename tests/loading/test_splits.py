"""Splits: groups stay whole, labels are balanced, sizes hold, order does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.loading.splits import (
    make_folds,
    make_split,
    normalise_split_name,
    require_split,
    stratified_folds,
)

SHARES = [0.5, 0.4, 0.1]


def make_bags(
    seed: int, bags: int = 211, groups: int = 0, labels: int = 7
) -> tuple[list[str], np.ndarray, list[str]]:
    """Ids, labels (common to rare) and groups (0 for none, else of unequal sizes)."""
    rng = np.random.default_rng(seed)
    table = (rng.random((bags, labels)) < np.geomspace(0.4, 0.03, labels)).astype(np.int64)
    ids = [f"bag-{i:04d}" for i in range(bags)]
    names = [f"group-{int(groups * u**2)}" for u in rng.random(bags)] if groups else [""] * bags
    return ids, table, names


def imbalance(labels: np.ndarray, folds: np.ndarray, shares: list[float]) -> float:
    """Mean absolute difference between wanted and real number of positives, per label and fold."""
    real = np.array([labels[folds == k].sum(axis=0) for k in range(len(shares))])
    return float(np.abs(real - np.outer(shares, labels.sum(axis=0))).mean())


def counts(splits: list[str]) -> dict[str, int]:
    return {name: splits.count(name) for name in ("test", "train", "validation")}


# --- names ---------------------------------------------------------------------------------------


def test_split_names() -> None:
    names = ["train", "val", "validation", "test"]
    assert [normalise_split_name(name) for name in names] == [
        "train",
        "validation",
        "validation",
        "test",
    ]
    with pytest.raises(UnknownNameError, match="known split, got 'trian'; did you mean train"):
        normalise_split_name("trian")
    with pytest.raises(InputError, match="known split, got ''"):
        normalise_split_name("")


# --- values --------------------------------------------------------------------------------------


def test_default_is_half_test_two_fifths_train_one_tenth_validation() -> None:
    ids, labels, groups = make_bags(0, bags=210)
    assert counts(make_split(ids, labels, groups, seed=0)) == {
        "test": 105,
        "train": 84,
        "validation": 21,
    }


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_divided_exactly_where_they_can_be(seed: int) -> None:
    # 10, 20 and 30 bags of three classes in the ratio 5:4:1: one answer only.
    classes = np.repeat([0, 1, 2], [10, 20, 30])
    folds = stratified_folds(np.eye(3, dtype=int)[classes], [""] * 60, SHARES, seed=seed)
    for fold, wanted in enumerate([[5, 10, 15], [4, 8, 12], [1, 2, 3]]):
        assert np.bincount(classes[folds == fold], minlength=3).tolist() == wanted


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_divided_exactly_where_they_can_be(seed: int) -> None:
    # Ten groups of 3 bags carry the label, ten groups of 3 bags do not.
    labels = np.repeat([1, 0], 30)[:, None]
    groups = [f"g{i // 3}" for i in range(60)]
    folds = stratified_folds(labels, groups, SHARES, seed=seed)
    for fold, wanted in enumerate([15, 12, 3]):
        assert (folds == fold).sum() == 2 * wanted
        assert labels[folds == fold].sum() == wanted


@pytest.mark.parametrize("seed", range(5))
def test_large_groups_go_first(seed: int) -> None:
    # One group of 50 bags against 50 single bags: even, unless the singles were dealt out before.
    labels = np.ones((100, 1), int)
    folds = stratified_folds(labels, [""] * 50 + ["g"] * 50, [0.5, 0.5], seed=seed)
    assert np.bincount(folds).tolist() == [50, 50]


@pytest.mark.parametrize("seed", range(5))
def test_rarest_label_and_sizes_are_exact_where_labels_are_dense(seed: int) -> None:
    # Labels compete for every bag: the rarest, last in the table, is served first.
    rng = np.random.default_rng(seed)
    labels = (rng.random((210, 6)) < [0.9, 0.8, 0.7, 0.5, 0.3, 0.0]).astype(int)
    labels[rng.choice(210, size=10, replace=False), 5] = 1
    folds = stratified_folds(labels, [""] * 210, SHARES, seed=seed)
    assert np.bincount(folds).tolist() == [105, 84, 21]
    assert np.bincount(folds[labels[:, 5] == 1]).tolist() == [5, 4, 1]


def test_k_folds_share_a_rare_label() -> None:
    labels = (np.arange(53) < 5).astype(int)[:, None]
    folds = stratified_folds(labels, [""] * 53, [0.2] * 5, seed=1)
    assert sorted(folds[:5].tolist()) == [0, 1, 2, 3, 4]
    assert sorted(np.bincount(folds).tolist()) == [10, 10, 11, 11, 11]
    assert folds.dtype == np.int64


@pytest.mark.parametrize("labels", [np.zeros((97, 3), int), np.zeros((97, 0), int)])
def test_sizes_hold_without_any_positive(labels: np.ndarray) -> None:
    folds = stratified_folds(labels, [""] * 97, SHARES, seed=0)
    assert np.bincount(folds).tolist() == [48, 39, 10]  # 48.5, 38.8, 9.7 by largest remainder


# --- laws ----------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[str], list[float], int]:
    folds = draw(st.integers(1, 5))
    groups = draw(st.lists(st.sampled_from(["", *"abcdefghijk"]), min_size=1, max_size=60))
    groups += [f"more-{i}" for i in range(folds)]
    width = draw(st.integers(0, 4))
    cells = draw(
        st.lists(st.booleans(), min_size=len(groups) * width, max_size=len(groups) * width)
    )
    weights = draw(st.lists(st.integers(1, 10), min_size=folds, max_size=folds))
    shares = [weight / sum(weights) for weight in weights]
    table = np.array(cells, dtype=int).reshape(len(groups), width)
    return table, groups, shares, draw(st.integers(0, 99))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_groups_never_straddle_and_no_fold_is_empty(problem: Any) -> None:
    labels, groups, shares, seed = problem
    folds = stratified_folds(labels, groups, shares, seed=seed)
    for name in set(groups) - {""}:
        assert len({int(f) for f, g in zip(folds, groups, strict=True) if g == name}) == 1
    assert set(folds.tolist()) == set(range(len(shares)))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_fold_exceeds_its_share_by_a_whole_group(problem: Any) -> None:
    labels, groups, shares, seed = problem
    bags = len(groups)
    largest = max([groups.count(name) for name in set(groups) - {""}])
    sizes = np.bincount(stratified_folds(labels, groups, shares, seed=seed), minlength=len(shares))
    for size, share in zip(sizes, shares, strict=True):
        # The share is rounded to a whole number, and a fold that would be empty gets one group.
        assert size < max(share * bags + 1, 1) + largest


@pytest.mark.parametrize("groups", [0, 67], ids=["bags", "groups"])
def test_labels_are_better_balanced_than_by_chance(groups: int) -> None:
    stratified, by_chance = [], []
    for seed in range(7):
        _, labels, names = make_bags(seed, groups=groups)
        folds = stratified_folds(labels, names, SHARES, seed=seed)
        stratified.append(imbalance(labels, folds, SHARES))
        # By chance: the same folds, dealt to other groups (or bags) in turn.
        index = np.unique(names, return_inverse=True)[1] if groups else np.arange(len(names))
        rng = np.random.default_rng(seed)
        for _ in range(11):
            dealt = rng.choice(3, size=index.max() + 1, p=SHARES)[index]
            by_chance.append(imbalance(labels, dealt, SHARES))
    assert np.mean(stratified) < (0.7 if groups else 0.3) * np.mean(by_chance)


@pytest.mark.parametrize("groups", [0, 67], ids=["bags", "groups"])
def test_order_of_bags_does_not_matter(groups: int) -> None:
    ids, labels, names = make_bags(1, groups=groups)
    want = dict(zip(ids, make_split(ids, labels, names, seed=5), strict=True))
    order = np.random.default_rng(0).permutation(len(ids))
    shuffled = [ids[i] for i in order]
    again = make_split(shuffled, labels[order], [names[i] for i in order], seed=5)
    assert dict(zip(shuffled, again, strict=True)) == want


def test_order_of_fractions_does_not_matter() -> None:
    ids, labels, names = make_bags(2)
    one = make_split(ids, labels, names, fractions={"train": 0.7, "val": 0.3}, seed=5)
    assert one == make_split(ids, labels, names, fractions={"val": 0.3, "train": 0.7}, seed=5)
    assert set(one) == {"train", "validation"}


def test_bags_as_their_own_groups_are_bags_without_groups() -> None:
    ids, labels, none = make_bags(3)
    assert make_split(ids, labels, ids, seed=5) == make_split(ids, labels, none, seed=5)


def test_a_group_named_like_a_bag_is_another_group() -> None:
    # Bag "a" has no group; the group "a" of the others must not take it in.
    ids = ["a", "b", "c"]
    splits = make_split(
        ids, np.zeros((3, 1)), ["", "a", "a"], fractions={"train": 0.5, "test": 0.5}, seed=0
    )
    assert splits[1] == splits[2] != splits[0]


def test_seed_decides() -> None:
    ids, labels, names = make_bags(4)
    first, again, other = (make_split(ids, labels, names, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert counts(first) == counts(other)


@pytest.mark.parametrize("groups", [0, 67], ids=["bags", "groups"])
def test_a_made_split_passes_its_check(groups: int) -> None:
    ids, labels, names = make_bags(5, groups=groups)
    splits = make_split(ids, labels, names, seed=0)
    require_split(ids, splits, names)
    require_split(ids[:3], ["train", "validation", "test"], ["", "", ""])


# --- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "groups", "match"),
    [
        (
            ["train", "test", "test", "validation"],
            ["g", "", "g", ""],
            r"group 'g': expected .* got bags in train and in test \('c'\); put the whole group",
        ),
        (["train", "val", "test", "test"], [""] * 4, "split of bag 'b': .* got 'val'; correct"),
        (["train", "", "test", "test"], [""] * 4, "split of bag 'b': .* got ''"),
        (
            ["train", "train", "train", "test"],
            [""] * 4,
            "expected bags in each of .* got none in validation; move bags into it",
        ),
        (["train"] * 4, [""] * 4, "got none in validation and none in test"),
        (["train"] * 3, [""] * 4, "splits: expected one for each of 4 bags, got 3"),
        (["train"] * 4, [""] * 5, "groups: expected one for each of 4 bags, got 5"),
    ],
)
def test_bad_splits_are_refused(splits: list[str], groups: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        require_split(["a", "b", "c", "d"], splits, groups)


def test_an_id_must_not_occur_twice() -> None:
    with pytest.raises(InputError, match="bag 'a': expected each bag once"):
        require_split(["a", "b", "a"], ["train", "validation", "test"], [""] * 3)
    with pytest.raises(InputError, match="bag 'a': expected each bag once"):
        make_split(["a", "b", "a"], np.zeros((3, 2)), [""] * 3, seed=0)


@pytest.mark.parametrize(
    ("labels", "groups", "fractions", "match"),
    [
        (np.zeros((4, 2)), [""] * 5, SHARES, r"labels: .* \(5, labels\), got .* \(4, 2\)"),
        (np.zeros(5), [""] * 5, SHARES, r"labels: expected .* got float64 of shape \(5,\)"),
        (np.full((5, 2), 2), [""] * 5, SHARES, "labels, bag 0, label 0: expected 0 or 1, got 2"),
        (np.full((5, 2), np.nan), [""] * 5, SHARES, "expected 0 or 1, got nan"),
        (np.zeros((5, 2)), [""] * 5, [0.5, 0.4], r"fractions: .* got \[0.5, 0.4\]"),
        (np.zeros((5, 2)), [""] * 5, [1.0, 0.0], r"above 0 .* got \[1.0, 0.0\]"),
        (np.zeros((5, 2)), [""] * 5, [], r"fractions: .* got \[\]"),
        (np.zeros((5, 2)), ["g"] * 4 + ["h"], SHARES, r"of 3 folds, got 2 groups \(5 bags\)"),
    ],
)
def test_bad_arguments_are_refused(
    labels: np.ndarray, groups: list[str], fractions: list[float], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        stratified_folds(labels, groups, fractions, seed=0)


def test_unknown_split_in_fractions_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="got 'tests'; did you mean test"):
        make_split(["a"], [[0]], [""], fractions={"tests": 1.0}, seed=0)


# --- folds of equal size -------------------------------------------------------------------------


def test_folds_do_not_depend_on_the_order_of_the_bags() -> None:
    ids, labels, groups = make_bags(3, bags=101, groups=41)
    folds = make_folds(ids, labels, groups, folds=7, seed=5)
    order = np.random.default_rng(0).permutation(101)
    shuffled = make_folds(
        [ids[i] for i in order], labels[order], [groups[i] for i in order], folds=7, seed=5
    )
    assert shuffled.tolist() == folds[order].tolist()
    assert len({(group, fold) for group, fold in zip(groups, folds, strict=True)}) == len(
        set(groups)
    )
    assert np.bincount(folds, minlength=7).min() > 0


def test_folds_without_groups_have_equal_sizes() -> None:
    ids, labels, groups = make_bags(1, bags=103)
    sizes = np.bincount(make_folds(ids, labels, groups, folds=5, seed=0))
    assert sorted(sizes.tolist()) == [20, 20, 21, 21, 21]


def test_folds_of_bags_that_occur_twice_are_refused() -> None:
    with pytest.raises(InputError, match="each bag once"):
        make_folds(["a", "a", "b"], np.ones((3, 1)), ["", "", ""], folds=3, seed=0)
