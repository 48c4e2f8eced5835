"""Things chosen by name with options, such as losses: frozen dataclasses, a literal registry each.

The options of a choice are the fields of its class; each class checks its values itself, with
`check_number` where they are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from dragn_cache.errors import InputError, UnknownNameError

T = TypeVar("T")


def choose(kind: str, registry: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    """Make what a registry holds under a name.

    Args:
        kind: what it is, for errors: ``"loss"``.

    Raises:
        UnknownNameError: the registry does not have the name.
        InputError: an option that it does not have, lacks, or does not allow to have this value.
    """
    if name not in registry:
        raise UnknownNameError(kind, name, registry)
    cls = registry[name]
    known = {f.name: f.default is not MISSING for f in fields(cls)}  # type: ignore[arg-type]
    check_options(f"{kind} {name}", options, known)
    return cls(**options)


def check_options(owner: str, options: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    """Raise an InputError for an option that ``owner`` does not have, or one that it lacks.

    Args:
        owner: what has the options: ``"loss focal"``.
        known: its options, and whether each has a default.
    """
    for option in options:
        if option not in known:
            raise InputError(
                owner,
                expected=f"its options ({', '.join(known) or 'it has none'})",
                got=f"option {option!r}",
                remedy="remove or rename it",
            )
    for option, has_default in known.items():
        if not has_default and option not in options:
            raise InputError(
                owner,
                expected=f"option {option!r}, which has no default",
                got="none",
                remedy=f"give {option}=…",
            )


def check_number(owner: str, option: str, value: object, low: float, high: float) -> None:
    """Raise an InputError that names the option unless ``value`` is a number in [low, high].

    Args:
        owner: what has the option: ``"loss focal"``.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise InputError(
            f"{owner}, option {option}",
            expected=f"a number from {low:g} to {high:g}",
            got=repr(value),
            remedy="change it",
        )


def check_whole(owner: str, option: str, value: object, least: int) -> None:
    """Raise an InputError that names the option unless ``value`` is a whole number >= least."""
    if type(value) is not int or value < least:
        raise InputError(
            f"{owner}, option {option}",
            expected=f"a whole number of at least {least}",
            got=repr(value),
            remedy="change it",
        )


def check_choice(owner: str, option: str, value: object, allowed: Sequence[object]) -> None:
    """Raise an InputError that names the option unless ``value`` is one of ``allowed``.

    Types count: True is not 1.
    """
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise InputError(
            f"aggregator {owner}, option {option}",
            expected="one of " + ", ".join(repr(a) for a in allowed),
            got=repr(value),
            remedy="choose one of them",
        )


def check_count(owner: str, option: str, value: object, *, least: int = 1) -> None:
    """Raise an InputError that names the option unless ``value`` is a whole number, big enough."""
    if type(value) is not int or value < least:
        raise InputError(
            f"aggregator {owner}, option {option}",
            expected=f"a whole number above {least - 1}",
            got=repr(value),
            remedy=f"give {option}=64, say",
        )


def check_rate(owner: str, option: str, value: object) -> None:
    """Raise an InputError that names the option unless ``value`` is a number in [0, 1)."""
    if type(value) not in (int, float) or not 0 <= value < 1:  # type: ignore[operator]
        raise InputError(
            f"aggregator {owner}, option {option}",
            expected="a number from 0 to below 1",
            got=repr(value),
            remedy=f"give {option}=0.25, say",
        )


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(
            option, expected=" or ".join(allowed), got=repr(value), remedy="choose one of these"
        )


def at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(
            option, expected=f"at least {least}", got=str(value), remedy="give a larger number"
        )
