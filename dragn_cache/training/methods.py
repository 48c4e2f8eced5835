"""What can be trained on bags by name: aggregators, by gradients, and classical methods, fitted.

`fit_method` trains either kind, `load_model` brings either back, `predict_method` applies either;
whoever calls these need not know which it is. What differs between them is in `Facts`. Everything
here comes from declarations: only a class of one's own is imported for it, and torch with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dragn_cache.aggregators.declared import AGGREGATORS, Needs
from dragn_cache.aggregators.registry import SEE_LIST, aggregator_class, options_of
from dragn_cache.classical.declared import CLASSICAL
from dragn_cache.errors import UnknownNameError
from dragn_cache.options import REQUIRED, Declared, declarations

SUPPLIED = ("labels", "task")
"""Options of aggregators that training knows."""


@dataclass(frozen=True)
class Facts:
    """What a method is like.

    Attributes:
        needs: the tap that it is meant for, "map", "vector" or "any".
        order_sensitive: whether the order of a bag's instances counts.
        attention: whether it weighs instances.
        classifier: ``head``, layers trained with the aggregator, or ``svm``.
    """

    needs: Needs
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
        return Facts("any", False, False, "svm")
    if ":" not in name and name not in AGGREGATORS:
        raise UnknownNameError("aggregator", name, [*AGGREGATORS, *CLASSICAL], remedy=SEE_LIST)
    known = AGGREGATORS[name] if name in AGGREGATORS else aggregator_class(name)
    return Facts(known.needs, known.order_sensitive, known.has_attention, "head")


def method_declarations(name: str) -> Mapping[str, Declared]:
    """A method's options; what training supplies, ``labels`` and ``task``, is left out.

    Raises:
        UnknownNameError, InputError: as in `method_facts`.
    """
    method_facts(name)
    if name in CLASSICAL:
        return declarations(CLASSICAL[name].options)
    return {option: d for option, d in options_of(name).items() if option not in SUPPLIED}


def method_options(name: str) -> dict[str, Any]:
    """A method's options and their defaults; "required" for one that has none.

    Raises:
        UnknownNameError, InputError: as in `method_facts`.
    """
    return {
        option: "required" if declared.default is REQUIRED else declared.default
        for option, declared in method_declarations(name).items()
    }


def method_text(name: str) -> str:
    """One line on what a method does; of a class of one's own, what it says about itself."""
    method_facts(name)
    registered = CLASSICAL.get(name) or AGGREGATORS.get(name)
    if registered is not None:
        return registered.text
    return inspect.cleandoc(aggregator_class(name).__doc__ or "")


def method_names() -> list[str]:
    """The names of all methods, sorted."""
    return sorted([*AGGREGATORS, *CLASSICAL])
