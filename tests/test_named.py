"""Things chosen by name: errors that name their owner, and signatures as settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest

from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.named import choose, signature_settings
from dragn_cache.options import Settings, declarations, setting

if TYPE_CHECKING:
    from decimal import Decimal


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
    assert signature_settings(Foreign)(value=3).given == {"value": 3}
