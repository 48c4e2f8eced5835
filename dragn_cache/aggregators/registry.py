"""The aggregators by name: one file per published method, one line here."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from dragn_cache.aggregators.abmil import Abmil, GatedAbmil
from dragn_cache.aggregators.acmil import Acmil
from dragn_cache.aggregators.annofly import AnnoFly
from dragn_cache.aggregators.base import Aggregator
from dragn_cache.aggregators.bilstm import BiLstm
from dragn_cache.aggregators.bow import Bow
from dragn_cache.aggregators.clam import ClamMb, ClamSb
from dragn_cache.aggregators.deepmiml import DeepMiml
from dragn_cache.aggregators.deepsets import DeepSets
from dragn_cache.aggregators.dragn import Dragn
from dragn_cache.aggregators.dsmil import Dsmil
from dragn_cache.aggregators.dtfd import Dtfd
from dragn_cache.aggregators.hamil import Hamil
from dragn_cache.aggregators.imploc import Imploc
from dragn_cache.aggregators.max import Max
from dragn_cache.aggregators.mean import Mean
from dragn_cache.aggregators.nan import Nan
from dragn_cache.aggregators.netvlad import NetVlad
from dragn_cache.aggregators.rrt import Rrt
from dragn_cache.aggregators.set_transformer import SetTransformer
from dragn_cache.aggregators.si import Si
from dragn_cache.aggregators.spoc import Spoc
from dragn_cache.aggregators.transmil import Transmil
from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.old_options import check_options

AGGREGATORS: dict[str, type[Aggregator]] = {
    "abmil": Abmil,
    "acmil": Acmil,
    "annofly": AnnoFly,
    "bilstm": BiLstm,
    "bow": Bow,
    "clam_mb": ClamMb,
    "clam_sb": ClamSb,
    "deepmiml": DeepMiml,
    "deepsets": DeepSets,
    "dragn": Dragn,
    "dsmil": Dsmil,
    "dtfd": Dtfd,
    "gated_abmil": GatedAbmil,
    "hamil": Hamil,
    "imploc": Imploc,
    "max": Max,
    "mean": Mean,
    "nan": Nan,
    "netvlad": NetVlad,
    "rrt": Rrt,
    "set_transformer": SetTransformer,
    "si": Si,
    "spoc": Spoc,
    "transmil": Transmil,
}

SEE_LIST = "see dragn-cache aggregators"


def create_aggregator(name: str, *, in_shape: tuple[int, ...], **options: Any) -> Aggregator:
    """Make an aggregator for instances of ``in_shape``, (C, h, w) or (C,).

    Args:
        name: a key of ``AGGREGATORS``, or ``package.module:Class`` for a class of one's own.
        in_shape: the shape of one instance, as ``RaggedBags.in_shape`` gives it.
        options: the keyword arguments of the method's class.

    Raises:
        UnknownNameError: no aggregator has this name.
        InputError: an option that the method does not have, one that it lacks, a value that it
            does not allow, or a class that cannot be imported.
    """
    cls = aggregator_class(name)
    known = {
        option: parameter.default is not inspect.Parameter.empty
        for option, parameter in options_of(cls).items()
    }
    check_options(f"aggregator {name}", options, known)
    return cls(in_shape, **options)


def options_of(cls: type[Aggregator]) -> dict[str, inspect.Parameter]:
    """The options of a method's class: its keyword-only arguments."""
    return {
        option: parameter
        for option, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


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
        return AGGREGATORS[name]
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
