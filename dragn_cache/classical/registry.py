"""Classical methods made by name; imported when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dragn_cache.classical.declared import CLASSICAL
from dragn_cache.options import make

if TYPE_CHECKING:
    from dragn_cache.classical.base import ClassicalMethod


def create_classical(name: str, options: Mapping[str, Any]) -> ClassicalMethod:
    """The method of a registered name with these options.

    Raises:
        UnknownNameError: it does not have an option.
        InputError: an option has a value that it does not allow.
    """
    cls: type[ClassicalMethod] = CLASSICAL[name].load()
    return make(f"aggregator {name}", cls, options)
