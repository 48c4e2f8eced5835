"""Classical methods: a bag as one vector, made without gradients, and support vector machines."""

from dragn_cache.classical.base import ClassicalMethod
from dragn_cache.classical.model import ClassicalModel, fit_model
from dragn_cache.classical.registry import CLASSICAL, create_classical
from dragn_cache.classical.svm import MachineChoice

__all__ = [
    "CLASSICAL",
    "ClassicalMethod",
    "ClassicalModel",
    "MachineChoice",
    "create_classical",
    "fit_model",
]
