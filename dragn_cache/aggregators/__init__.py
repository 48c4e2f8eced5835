"""The aggregators by name: one file per published method, one line here."""

from __future__ import annotations

import inspect
from typing import Any

from dragn_cache.aggregators.abmil import Abmil, GatedAbmil
from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.dragn import Dragn
from dragn_cache.aggregators.max import Max
from dragn_cache.aggregators.mean import Mean
from dragn_cache.errors import InputError, UnknownNameError

__all__ = ["AGGREGATORS", "Aggregated", "Aggregator", "create_aggregator"]

AGGREGATORS: dict[str, type[Aggregator]] = {
    "abmil": Abmil,
    "dragn": Dragn,
    "gated_abmil": GatedAbmil,
    "max": Max,
    "mean": Mean,
}


def create_aggregator(name: str, *, in_shape: tuple[int, ...], **options: Any) -> Aggregator:
    """Make an aggregator for instances of ``in_shape``, (C, h, w) or (C,).

    Args:
        name: a key of ``AGGREGATORS``.
        in_shape: the shape of one instance, as ``RaggedBags.in_shape`` gives it.
        options: the keyword arguments of the method's class.

    Raises:
        UnknownNameError: no aggregator has this name.
        InputError: an option that the method does not have, one that it lacks, or a value that
            it does not allow.
    """
    if name not in AGGREGATORS:
        raise UnknownNameError("aggregator", name, AGGREGATORS)
    cls = AGGREGATORS[name]
    known = {
        option: parameter
        for option, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in known:
            raise InputError(
                f"aggregator {name}",
                expected=f"its options ({', '.join(known) or 'it has none'})",
                got=f"option {option!r}",
                remedy="remove or rename it",
            )
    for option, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise InputError(
                f"aggregator {name}",
                expected=f"option {option!r}, which has no default",
                got="none",
                remedy=f"give {option}=…",
            )
    return cls(in_shape, **options)
