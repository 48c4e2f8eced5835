"""Aggregators: ragged bags in, one embedding per bag out."""

from dragn_cache.aggregators.base import Aggregated, Aggregator
from dragn_cache.aggregators.registry import (
    AGGREGATORS,
    aggregator_class,
    create_aggregator,
    options_of,
)

__all__ = [
    "AGGREGATORS",
    "Aggregated",
    "Aggregator",
    "aggregator_class",
    "create_aggregator",
    "options_of",
]
