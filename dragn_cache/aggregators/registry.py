"""Aggregators made by name, of this package or of one's own; imported when they are asked for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dragn_cache.aggregators.declared import AGGREGATORS
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.options import Declared, declarations, make, require_known, signature_settings

if TYPE_CHECKING:
    from dragn_cache.aggregators.base import Aggregator

SEE_LIST = "see dragn-cache aggregators"


def create_aggregator(name: str, *, in_shape: tuple[int, ...], **options: Any) -> Aggregator:
    """Make an aggregator for instances of ``in_shape``, (C, h, w) or (C,).

    Args:
        name: a key of ``AGGREGATORS``, or ``package.module:Class`` for a class of one's own.
        in_shape: the shape of one instance, as ``RaggedBags.in_shape`` gives it.
        options: those of `options_of`.

    Raises:
        UnknownNameError: no aggregator has this name, or no option of it.
        InputError: an option that the method lacks, a value that it does not allow, or a class
            that cannot be imported.
    """
    cls = aggregator_class(name)
    if name not in AGGREGATORS:
        options = _checked(name, cls, options)
    return cls(in_shape, **options)


def options_of(name: str) -> Mapping[str, Declared]:
    """The options of a method by name, for which a registered one is not imported.

    Those of a class of one's own are its keyword-only arguments and, where it has ``**options``,
    those of the method that it is derived from.

    Raises:
        UnknownNameError, InputError: as `aggregator_class`.
    """
    if name in AGGREGATORS:
        return declarations(AGGREGATORS[name].options)
    cls = aggregator_class(name)
    own = declarations(signature_settings(cls))
    parameters = inspect.signature(cls).parameters.values()
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {**declarations(cls.options_class), **own} if passes_on else own


def _checked(name: str, cls: type[Aggregator], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a class of one's own, checked as its signature declares them."""
    require_known(f"aggregator {name}", options, options_of(name), "option")
    signature = signature_settings(cls)
    own = {option: v for option, v in options.items() if option in declarations(signature)}
    return {**options, **make(f"aggregator {name}", signature, own).given}


def aggregator_class(name: str) -> type[Aggregator]:
    """The class of a registered name, or of ``package.module:Class``.

    The module is looked for where Python looks, ``sys.path``; the command line adds the working
    directory to that.

    Raises:
        UnknownNameError: no aggregator has this name.
        InputError: there is no such module or no such aggregator in it.
    """
    if ":" not in name:
        if name not in AGGREGATORS:
            raise UnknownNameError("aggregator", name, AGGREGATORS, remedy=SEE_LIST)
        cls: type[Aggregator] = AGGREGATORS[name].load()
        return cls
    from dragn_cache.aggregators.base import Aggregator

    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise InputError(
            f"aggregator {name}",
            expected="package.module:Class that can be imported",
            got=str(error),
            remedy="correct it, or run where the module is",
        ) from error
    if not (inspect.isclass(found) and issubclass(found, Aggregator)):
        raise InputError(
            f"aggregator {name}",
            expected="a subclass of dragn_cache.aggregators.Aggregator",
            got=repr(found),
            remedy="derive it from Aggregator and write aggregate",
        )
    absent = [fact for fact in ("needs", "order_sensitive") if not hasattr(found, fact)]
    absent += sorted(found.__abstractmethods__)
    if absent:
        raise InputError(
            f"aggregator {name}",
            expected="needs, order_sensitive and aggregate",
            got=f"a class without {', '.join(absent)}",
            remedy="write them; docs/training.md shows a whole class",
        )
    return found
