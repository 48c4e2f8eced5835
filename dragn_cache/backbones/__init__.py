"""Frozen backbones: torchvision's classification networks with taps, preprocessing and digest."""

from dragn_cache.backbones.backbone import Backbone, load_backbone
from dragn_cache.backbones.families import FAMILIES, Family, family, list_backbones
from dragn_cache.backbones.preprocessing import Preprocessing, default_preprocessing
from dragn_cache.backbones.taps import TapInfo, describe_taps
from dragn_cache.backbones.weights import (
    fetch_weights,
    read_state_dict,
    resolve_weights,
    weights_digest,
)

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
