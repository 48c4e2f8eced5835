from .backbone import Backbone, load_backbone
from .families import FAMILIES, Family, family, list_backbones
from .preprocessing import Preprocessing, default_preprocessing
from .taps import TapInfo, describe_taps
from .weights import fetch_weights, read_state_dict, resolve_weights, weights_digest

__all__ = [
    "FAMILIES",
    "Backbone",
    "Family",
    "Preprocessing",
    "TapInfo",
    "default_preprocessing",
    "describe_taps",
    "family",
    "fetch_weights",
    "list_backbones",
    "load_backbone",
    "read_state_dict",
    "resolve_weights",
    "weights_digest",
]
