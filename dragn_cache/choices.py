"""Things chosen by name with options, such as losses: frozen dataclasses, a literal registry each.

The options of a choice are the fields of its class; each class checks its values itself, with
`check_number` where they are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
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
