from .base import ClassicalMethod
from .declared import CLASSICAL
from .model import ClassicalModel, fit_model
from .registry import create_classical
from .svm import MachineChoice

__all__ = [
    "CLASSICAL",
    "ClassicalMethod",
    "ClassicalModel",
    "MachineChoice",
    "create_classical",
    "fit_model",
]
