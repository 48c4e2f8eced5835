"""Images that bags share although they may come to lie on two sides of a split."""

from __future__ import annotations

import itertools

import numpy as np

from dragn_cache.manifest import Bag
from dragn_cache.manifest.shared import find_shared, image_keys, warn_shared


def test_keys_are_of_the_image_and_the_box() -> None:
    digests = np.frombuffer(b"".join(bytes([k]) * 32 for k in (1, 1, 2, 1)), np.uint8)
    boxes = np.array([[0, 0, 5, 7], [0, 0, 7, 5], [0, 0, 5, 7], [0, 0, 5, 7]])
    keys = image_keys(digests.reshape(4, 32), boxes)
    assert len(set(keys.tolist())) == 3
    assert keys[0] == keys[3]
    grid = np.array(list(itertools.product(range(11), repeat=4)))
    many = image_keys(np.full((len(grid), 8), 255, np.uint8), grid)
    assert len(np.unique(many)) == len(grid)


def test_pairs_are_found_as_by_comparing_all_with_the_first_bag_of_each_image() -> None:
    rng = np.random.default_rng(0)
    bags = [Bag(f"b{k}", group="" if k % 3 == 0 else f"g{k % 5}") for k in range(23)]
    members = rng.integers(23, size=211)
    keys = rng.integers(60, size=211).astype(np.uint64)
    sides = [("train", "test")[k % 2] for k in range(23)]
    for known in (None, sides):
        wanted: dict[tuple[int, int], set[int]] = {}
        for key in set(keys.tolist()):
            having = sorted(set(members[keys == key].tolist()))
            for other in having[1:]:
                same = bags[other].group == bags[having[0]].group != ""
                if known is not None:
                    same = known[other] == known[having[0]]
                if not same:
                    wanted.setdefault((having[0], other), set()).add(key)
        pairs = find_shared(bags, members, keys, known)
        assert {(p.first, p.other): p.images for p in pairs} == {
            pair: len(images) for pair, images in wanted.items()
        }
        assert all(pair.key in wanted[pair.first, pair.other] for pair in pairs)
    assert find_shared(bags, members[:0], keys[:0]) == []


def test_a_line_says_how_many() -> None:
    bags = [Bag("a"), Bag("b"), Bag("c")]
    pairs = find_shared(bags, np.arange(3), np.zeros(3, np.uint64))
    said: list[str] = []
    warn_shared(bags, pairs, "images", said.append)
    assert said == [
        "bags with the same images perhaps on two sides of a fold: 'a' and 'b', and 1 more such; "
        "give them one group"
    ]
