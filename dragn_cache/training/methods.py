"""What can be trained on bags by name: aggregators, by gradients, and classical methods, fitted.

`fit_method` trains either kind, `load_model` brings either back, `predict_method` applies either;
whoever calls these need not know which it is. What differs between them is in `Facts`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any, Literal

from dragn_cache.aggregators import AGGREGATORS, aggregator_class, options_of
from dragn_cache.aggregators.registry import SEE_LIST
from dragn_cache.classical import CLASSICAL
from dragn_cache.errors import UnknownNameError


@dataclass(frozen=True)
class Facts:
    """What a method is like.

    Attributes:
        needs: the tap that it is meant for, "map", "vector" or "any".
        order_sensitive: whether the order of a bag's instances counts.
        attention: whether it weighs instances.
        classifier: ``head``, layers trained with the aggregator, or ``svm``.
    """

    needs: Literal["map", "vector", "any"]
    order_sensitive: bool
    attention: bool
    classifier: Literal["head", "svm"]


def method_facts(name: str) -> Facts:
    """What the method of a name is like.

    Args:
        name: of an aggregator, a classical method, or ``package.module:Class``.

    Raises:
        UnknownNameError: there is no such method.
        InputError: a class cannot be imported, or is no aggregator.
    """
    if name in CLASSICAL:
        return Facts(CLASSICAL[name].needs, False, False, "svm")
    if ":" not in name and name not in AGGREGATORS:
        raise UnknownNameError("aggregator", name, [*AGGREGATORS, *CLASSICAL], remedy=SEE_LIST)
    cls = aggregator_class(name)
    return Facts(cls.needs, cls.order_sensitive, cls.has_attention, "head")


def method_options(name: str) -> dict[str, Any]:
    """A method's options and their defaults; "required" for one that has none.

    What training supplies, ``labels`` and ``task``, is left out.

    Raises:
        UnknownNameError, InputError: as in `method_facts`.
    """
    method_facts(name)
    if name in CLASSICAL:
        return {field.name: field.default for field in fields(CLASSICAL[name])}
    return {
        option: "required" if parameter.default is parameter.empty else parameter.default
        for option, parameter in options_of(aggregator_class(name)).items()
        if option not in SUPPLIED
    }


def method_text(name: str) -> str:
    """What the class of a method says about itself."""
    method_facts(name)
    cls: type = CLASSICAL[name] if name in CLASSICAL else aggregator_class(name)
    return inspect.cleandoc(cls.__doc__ or "")


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted([*AGGREGATORS, *CLASSICAL])


SUPPLIED = ("labels", "task")  # options of aggregators that training knows
