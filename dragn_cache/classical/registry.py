"""The classical methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dragn_cache.classical.average import Average
from dragn_cache.classical.base import ClassicalMethod
from dragn_cache.classical.fisher import FisherVectors
from dragn_cache.classical.words import BagOfWords, Vlad
from dragn_cache.old_options import check_options

CLASSICAL: dict[str, type[ClassicalMethod]] = {
    "bovw": BagOfWords,
    "fisher": FisherVectors,
    "svm": Average,
    "vlad": Vlad,
}


def create_classical(name: str, options: Mapping[str, Any]) -> ClassicalMethod:
    """The method of a registered name with these options.

    Raises:
        InputError: an option that it does not have, or a value that it does not allow.
    """
    cls = CLASSICAL[name]
    known = dict.fromkeys(sorted(field.name for field in fields(cls)), True)  # all have defaults
    check_options(f"aggregator {name}", options, known)
    return cls(**options)
