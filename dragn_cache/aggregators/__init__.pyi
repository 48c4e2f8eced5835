from .base import Aggregated, Aggregator
from .declared import AGGREGATORS
from .registry import aggregator_class, create_aggregator, options_of

__all__ = [
    "AGGREGATORS",
    "Aggregated",
    "Aggregator",
    "aggregator_class",
    "create_aggregator",
    "options_of",
]
