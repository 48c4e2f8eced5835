"""Settings that are declared once."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le
from hypothesis import given
from hypothesis import strategies as st

from dragn_cache.errors import InputError, SettingError, UnknownNameError
from dragn_cache.options import (
    Settings,
    choose,
    declarations,
    from_toml,
    merge,
    of_kind,
    read_table,
    setting,
    signature_settings,
    to_toml,
)

if TYPE_CHECKING:
    from decimal import Decimal


def even(value: int) -> None:
    if value % 2:
        raise InputError("number", expected="an even number", got=str(value), remedy="add 1")


class Inner(Settings):
    """Settings in settings."""

    width: int = setting(3, ge=1, help="Width.")
    mode: Literal["none", "soft"] = setting("soft", help="Mode.")

    def require_consistent(self) -> None:
        if self.mode == "none" and self.width != 3:
            raise SettingError("width", expected="`mode=soft`", got="none", remedy="leave it out")


class Settled(Settings):
    """One setting of every type."""

    rate: float = setting(3e-4, ge=0, le=1000, help="Rate.", kind="numerics", sweep=True)
    share: float = setting(0.5, ge=0, lt=1, help="Share.")
    above: float = setting(1.0, gt=0, help="Above.")
    count: int = setting(2, ge=1, help="Count.", kind="plan")
    side: Literal[1, 2] = setting(1, help="Side.")
    name: Literal["adam", "sgd"] = setting("adam", help="Name.", kind="features")
    text: str | None = setting(None, help="Text.", kind="features")
    size: tuple[int, int] | None = setting(None, help="Size.")
    names: tuple[str, ...] = setting((), help="Names.")
    options: Mapping[str, Any] = setting({}, help="Options.", options_of="name")
    weight: Annotated[float, Ge(0), Le(10)] | Literal["balanced"] | None = setting(
        None, help="Weight."
    )
    alpha: float | None = setting(0.25, help="Alpha.")
    on: bool = setting(True, help="On.")
    pairs: int | None = setting(None, help="Pairs.", check=even)
    inner: Inner = setting(Inner(), help="Inner.")


numbers = st.floats(0, 1000)
texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text != "none")
free = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), numbers, texts)
settled = st.builds(
    Settled,
    rate=numbers,
    share=st.floats(0, 0.99),
    count=st.integers(1, 2**60),
    side=st.sampled_from([1, 2]),
    name=st.sampled_from(["adam", "sgd"]),
    text=st.none() | texts,
    size=st.none() | st.tuples(st.integers(), st.integers(-5, 5)).map(lambda s: (s[1], s[1])),
    names=st.lists(texts, max_size=3),
    options=st.dictionaries(texts, free | st.lists(st.integers(0, 9), max_size=3), max_size=3),
    weight=st.none() | st.just("balanced") | st.floats(0, 10),
    alpha=st.none() | numbers,
    on=st.booleans(),
    pairs=st.none() | st.integers(0, 50).map(lambda n: 2 * n),
    inner=st.builds(Inner, mode=st.sampled_from(["none", "soft"])),
)


# --- laws --------------------------------------------------------------------------------------


@given(settled)
def test_toml_that_is_written_and_read_gives_equal_settings(config: Settled) -> None:
    import tomllib

    table = tomllib.loads(to_toml(config))
    assert table == config.to_table()
    assert Settled.from_table(table, "x.toml") == config


@given(settled)
def test_a_copy_from_all_values_by_pickle_and_without_changes_is_equal(config: Settled) -> None:
    assert Settled(**config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.replace() == config
    assert config.replace(count=7).to_dict() == {**config.to_dict(), "count": 7}


def test_settings_are_frozen_and_nothing_of_the_callers_is_kept() -> None:
    given = {"a": [1, 2]}
    config = Settled(options=given, names=["x", "y"])  # type: ignore[arg-type]
    given["a"].append(3)
    given["b"] = []
    assert config.options == {"a": (1, 2)}
    assert config.names == ("x", "y")
    with pytest.raises(AttributeError, match=r"Settled is frozen; use replace\(rate=…\)"):
        config.rate = 1.0  # type: ignore[misc]
    assert config.rate == 3e-4


def test_a_whole_number_is_a_number_and_equal_values_are_equal_settings() -> None:
    assert Settled(rate=1) == Settled(rate=1.0)
    assert type(Settled(rate=1).rate) is float
    assert Settled() != Settled(rate=1)


def test_none_and_the_text_none_stand_for_what_alone_is_allowed() -> None:
    assert Settled(alpha="none").alpha is None  # type: ignore[arg-type]
    assert Settled(alpha=None).to_table()["alpha"] == "none"
    assert Inner(mode=None).mode == "none"  # type: ignore[arg-type]
    assert Settled(options={"x": "none"}).options == {"x": None}
    assert Settled(text="none").text == "none"
    assert "text" not in Settled().to_table()


def test_the_table_has_all_that_is_not_none() -> None:
    assert Settled(size=(3, 5), options={"k": (1, 2), "n": None}).to_table() == {
        "rate": 3e-4,
        "share": 0.5,
        "above": 1.0,
        "count": 2,
        "side": 1,
        "name": "adam",
        "size": [3, 5],
        "names": [],
        "options": {"k": [1, 2], "n": "none"},
        "alpha": 0.25,
        "on": True,
        "inner": {"width": 3, "mode": "soft"},
    }


# --- errors ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "low": ({"rate": -1}, "rate: expected a number from 0 to 1000, got -1; change it"),
    "nan": ({"rate": math.nan}, "rate: expected a number from 0 to 1000, got nan; change it"),
    "inf": ({"above": math.inf}, "above: expected a number above 0, got inf; change it"),
    "at the bound": ({"above": 0}, "above: expected a number above 0, got 0; change it"),
    "below": ({"share": 1}, "share: expected a number from 0 to below 1, got 1; change it"),
    "text": ({"rate": "3"}, "rate: expected a number from 0 to 1000, got '3'; change it"),
    "zero": ({"count": 0}, "count: expected a whole number of at least 1, got 0; change it"),
    "true": ({"count": True}, "count: expected a whole number of at least 1, got True; change it"),
    "part": ({"count": 1.0}, "count: expected a whole number of at least 1, got 1.0; change it"),
    "none": ({"count": None}, "count: expected a whole number of at least 1, got None; change it"),
    "choice": (
        {"name": "adamw"},
        "name: expected adam or sgd, got 'adamw'; did you mean adam? otherwise choose one of them",
    ),
    "another": ({"name": "lion"}, "name: expected adam or sgd, got 'lion'; choose one of them"),
    "true is not 1": ({"side": True}, "side: expected 1 or 2, got True; choose one of them"),
    "1 is not true": ({"on": 1}, "on: expected true or false, got 1; change it"),
    "short": ({"size": (3,)}, "size: expected 2 values, each a whole number, got (3,); change it"),
    "items": ({"names": [1]}, "names: expected a list, each a text, got [1]; change it"),
    "no list": ({"names": "ab"}, "names: expected a list, each a text, got 'ab'; change it"),
    "no table": ({"options": 3}, "options: expected a table of names and values, got 3; change it"),
    "union": (
        {"weight": "all"},
        "weight: expected a number from 0 to 10 or balanced, got 'all'; change it",
    ),
    "union's bound": (
        {"weight": 11},
        "weight: expected a number from 0 to 10 or balanced, got 11; change it",
    ),
    "check": ({"pairs": 3}, "pairs: expected an even number, got 3; add 1"),
    "nested": (
        {"inner": {"width": 0}},
        "inner.width: expected a whole number of at least 1, got 0; change it",
    ),
    "nested rule": (
        {"inner": {"mode": "none", "width": 5}},
        "inner.width: expected `mode=soft`, got none; leave it out",
    ),
    "no settings": (
        {"inner": 3},
        "inner: expected Inner, or a table of its settings, got 3; change it",
    ),
}


@pytest.mark.parametrize(("values", "line"), REFUSED.values(), ids=REFUSED)
def test_a_value_that_cannot_be_used_is_one_line(values: dict[str, Any], line: str) -> None:
    for make in (Settled, Settled().replace):
        with pytest.raises(SettingError) as caught:
            make(**values)
        assert str(caught.value) == line
        assert str(pickle.loads(pickle.dumps(caught.value))) == line
    with pytest.raises(InputError) as read:
        Settled.from_table(values, "my.toml")
    assert str(read.value) == f"my.toml: {line}"
    assert not isinstance(read.value, SettingError)
    with pytest.raises(SettingError):
        Settled.model_validate(values)


def test_an_unknown_name_offers_the_nearest_and_comes_before_other_faults() -> None:
    with pytest.raises(UnknownNameError, match=r"^Settled: expected a known setting, got 'rates'"):
        Settled(rates=1, count=0)  # type: ignore[call-arg]
    for where, table in (("x.toml", {"rates": 1}), ("x.toml: inner", {"inner": {"wide": 1}})):
        near = "rate" if "rates" in table else "width"
        with pytest.raises(InputError, match=rf"^{where}: .*; did you mean {near}[?,]"):
            Settled.from_table(table, "x.toml")


def test_a_setting_without_default_must_be_given() -> None:
    class Asked(Settings):
        count: int = setting(ge=1, help="Count.")

    with pytest.raises(SettingError, match=r"^count: expected a whole number .*none; give count=…"):
        Asked()
    assert Asked(count=3).count == 3


def test_a_declaration_that_cannot_keep_its_promise_is_refused() -> None:
    with pytest.raises(TypeError, match="lost is not declared by setting"):

        class Bare(Settings):
            lost: int = 3

    with pytest.raises(TypeError, match="needs None as its default"):

        class Ambiguous(Settings):
            text: str | None = setting("a", help="Its None could not be written.")

    with pytest.raises(TypeError, match="bounds of a union's number as Annotated"):

        class Mixed(Settings):
            weight: float | Literal["balanced"] = setting(1.0, ge=0, help="Weight.")


def test_a_file_that_is_no_toml_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    with pytest.raises(InputError, match=r"my\.toml: expected a TOML file, got No such file"):
        read_table(path)
    path.write_text("rate = \n")
    with pytest.raises(InputError, match=r"my\.toml: expected a TOML file, got Invalid value"):
        from_toml(Settled, path)
    path.write_text("[settled]\ncount = 5\n[other]\nx = 1\n")
    assert from_toml(Settled, path, "settled") == Settled(count=5)
    path.write_text("count = 5\n")
    assert from_toml(Settled, path, "settled") == Settled(count=5)


# --- what a declaration says -------------------------------------------------------------------


def test_a_declaration_says_type_bounds_choices_default_and_purpose() -> None:
    known = declarations(Settled)
    assert [*known][:3] == ["rate", "share", "above"]
    assert known["rate"].bounds == {"ge": 0, "le": 1000}
    assert known["weight"].bounds == {"ge": 0, "le": 10}
    assert known["name"].choices == ("adam", "sgd")
    assert known["rate"].choices is None
    assert [d.name for d in known.values() if d.sweep] == ["rate"]
    optional = [d.name for d in known.values() if d.optional]
    assert optional == ["text", "size", "weight", "alpha", "pairs"]
    assert known["rate"].default_text == "0.0003"
    assert known["text"].default_text == ""
    assert of_kind(Settled(text="a"), "features") == {"name": "adam", "text": "a"}
    assert of_kind(Settled(), "plan") == {"count": 2}


def test_layers_join_options_and_drop_those_of_another_choice() -> None:
    low, high = {"name": "sgd", "options": {"a": 1, "b": 2}, "rate": 1}, {"options": {"b": 3}}
    assert merge(Settled, low, high) == {"name": "sgd", "options": {"a": 1, "b": 3}, "rate": 1}
    assert merge(Settled, low, {"name": "sgd"}) == low
    assert merge(Settled, low, {"name": "adam"}) == {"name": "adam", "options": {}, "rate": 1}
    assert merge(Settled, low, {"name": "adam", "options": {"c": 1}})["options"] == {"c": 1}
    assert merge(Settled, {"options": {"a": 1}}, {"name": "adam"})["options"] == {"a": 1}
    assert merge(Settled, {"rate": 1}, {"rate": 2}) == {"rate": 2}


# --- things chosen by name ---------------------------------------------------------------------


class Focal(Settings):
    """A loss."""

    gamma: float = setting(2.0, ge=0, le=100, help="Focus.")
    alpha: float | None = setting(0.25, ge=0, le=1, help="Share.")


def test_a_choice_names_its_owner_and_option_in_every_error() -> None:
    registry = {"focal": Focal}
    assert choose("loss", registry, "focal", {"gamma": 1, "alpha": None}) == Focal(
        gamma=1, alpha=None
    )
    with pytest.raises(UnknownNameError, match=r"^loss: .*'fokal'; did you mean focal"):
        choose("loss", registry, "fokal", {})
    with pytest.raises(InputError, match=r"^loss focal: expected a known option, got 'gama'; did"):
        choose("loss", registry, "focal", {"gama": 1})
    line = "^loss focal, option gamma: expected a number from 0 to 100, got 101; change it$"
    with pytest.raises(InputError, match=line):
        choose("loss", registry, "focal", {"gamma": 101})


class Theirs:
    """A class of a user's."""

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        width: int,
        replace: bool = False,
        widths: list[int] = [5],  # noqa: B006 - users do
        free: Any = None,
        kind: Literal["a", "b"] = "a",
    ) -> None:
        self.all = (width, replace, widths, free, kind)


class Foreign:
    """A class with an annotation that exists for type checkers only."""

    def __init__(self, *, value: Decimal | None = None) -> None:
        self.value = value


def test_a_users_signature_is_checked_by_the_same_adapter() -> None:
    cls = signature_settings(Theirs)
    known = declarations(cls)
    assert [*known] == ["width", "replace", "widths", "free", "kind"]
    given = choose("aggregator", {"t": cls}, "t", {"width": 2, "widths": (1, 2)}).given
    assert given == {"width": 2, "widths": [1, 2]}
    assert Theirs((1,), **given).all == (2, False, [1, 2], None, "a")
    assert cls(width=1, free=object).given["free"] is object
    for options, line in (
        ({}, "option width: expected a whole number, got none; give width=…"),
        ({"width": "a"}, "option width: expected a whole number, got 'a'; change it"),
        ({"width": 1, "kind": "c"}, "option kind: expected a or b, got 'c'; choose one of them"),
    ):
        with pytest.raises(InputError) as caught:
            choose("aggregator", {"t": cls}, "t", options)
        assert str(caught.value) == f"aggregator t, {line}"
    assert signature_settings(Theirs, ("width",))().given == {}
    assert signature_settings(Foreign)(value=3).given == {"value": 3}


def test_the_module_loads_no_torch_and_no_numpy() -> None:
    code = "import sys, dragn_cache.options; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "typer", "tomli_w"} & set(done.stdout.split())
