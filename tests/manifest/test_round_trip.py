"""Tables: whatever is written is read back, and what cannot be is refused before it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dragn_cache.errors import InputError
from dragn_cache.files import LONGEST_CELL
from dragn_cache.manifest import (
    Bag,
    Instance,
    Manifest,
    read_bags,
    read_manifest,
    write_bags,
    write_manifest,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=7)
held = texts.filter(lambda text: text == text.strip() and "\0" not in text)
names = held.filter(bool)
bags_of_texts = st.lists(
    st.builds(
        Bag,
        bag_id=names,
        labels=st.lists(names, max_size=3, unique=True).map(tuple),
        group=held,
        extra=st.fixed_dictionaries({"note": held}),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda bag: bag.bag_id,
)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Nothing here depends on what a power failure would leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@given(bags_of_texts)
def test_bags_are_read_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, bags: list[Bag]
) -> None:
    path = tmp_path_factory.mktemp("tables") / "bags.csv"
    write_bags(bags, path)
    read, _, _ = read_bags(path)
    assert list(read) == bags


@given(texts)
def test_what_a_cell_cannot_hold_is_refused_and_the_rest_is_held(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("tables") / "bags.csv"
    bag = Bag("a", ("x",), extra={"note": text})
    if text == text.strip() and "\0" not in text:
        write_bags([bag], path)
        assert read_bags(path)[0] == (bag,)
        return
    with pytest.raises(InputError, match="note: expected a text that a table can hold"):
        write_bags([bag], path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("bag", "got"),
    [
        (Bag("a "), "'a ': space around it"),
        (Bag(""), "an empty id"),
        (Bag("a\udcff"), "a null character or no UTF-8"),
        (Bag("b", ("x ", "y")), r"\('x ', 'y'\)"),
        (Bag("b", ("",)), r"\('',\)"),
        (Bag("b", ("x", "x")), r"\('x', 'x'\)"),
        (Bag("ok"), "an id that another bag has"),
        (Bag("b", group="x" * (LONGEST_CELL + 1)), "131073 characters, more than 131072"),
        (Bag("b", ("x" * LONGEST_CELL, "y")), "131074 characters, more than 131072"),
    ],
)
def test_bags_that_would_not_come_back_are_refused(tmp_path: Path, bag: Bag, got: str) -> None:
    with pytest.raises(InputError, match=f"got .*{got}; correct it where it comes from"):
        write_bags([Bag("ok"), bag], tmp_path / "bags.csv")
    assert not (tmp_path / "bags.csv").exists()


def test_a_carriage_return_in_a_cell_is_kept(tmp_path: Path) -> None:
    bag = Bag("x\ry", ("l",), extra={"note": "a\r\nb"})
    write_bags([bag], tmp_path / "bags.csv")
    assert read_bags(tmp_path / "bags.csv")[0] == (bag,)


def test_the_longest_cell_is_read_back(tmp_path: Path) -> None:
    bag = Bag("b", ("x" * LONGEST_CELL,), group="é" * LONGEST_CELL)
    write_bags([bag], tmp_path / "bags.csv")
    assert read_bags(tmp_path / "bags.csv")[0] == (bag,)


def test_columns_named_as_those_of_images_are_kept_like_any_other(tmp_path: Path) -> None:
    columns = ("image", "FILENAME", "order", "x0", "y0", "x1", "y1")
    bags = tuple(Bag(f"b{k}", ("x",), extra=dict.fromkeys(columns, f"{k}")) for k in range(2))
    write_bags(bags, tmp_path / "bags.csv")
    assert read_bags(tmp_path / "bags.csv")[0] == bags
    with (tmp_path / "bags.csv").open("a") as file:
        file.write("b0,x,,,0,0,0,0,0,0,0\n")
    with pytest.raises(InputError, match=r"bags.csv:4: expected one row per bag, got 'b0' again"):
        read_bags(tmp_path / "bags.csv")


@given(names)
def test_images_are_read_back_or_refused(
    tmp_path_factory: pytest.TempPathFactory, image: str
) -> None:
    folder = tmp_path_factory.mktemp("data")
    instances = {"b": (Instance("b", f"i/{image}.png", 0),)}
    manifest = Manifest("m", "multilabel", ("x",), (Bag("b", ("x",)),), instances, folder)
    write_manifest(manifest, folder)
    if {"..", "{channel}"} & {*f"i/{image}.png".split("/"), *image[:9].split("-")}:
        return  # a path that leaves the image root, or one of channels that there are not
    assert read_manifest(folder).instances == instances


@pytest.mark.parametrize("image", [" a.png", "a.png\n", "a\0.png", "a\udcff.png"])
def test_images_that_would_not_come_back_are_refused(tmp_path: Path, image: str) -> None:
    instances = {"b": (Instance("b", image, 0),)}
    manifest = Manifest("m", "multilabel", ("x",), (Bag("b", ("x",)),), instances, tmp_path)
    with pytest.raises(InputError, match="bag 'b', image: expected a text that a table can hold"):
        write_manifest(manifest, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_table_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bags([Bag("a")], tmp_path / "bags.csv")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*bags\.csv"):
        write_bags([Bag("b"), Bag("c")], tmp_path / "bags.csv")
    assert read_bags(tmp_path / "bags.csv")[0] == (Bag("a"),)
    assert [path.name for path in tmp_path.iterdir()] == ["bags.csv"]
