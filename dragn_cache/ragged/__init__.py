"""Ragged bags: many bags as one array of rows and their offsets, and operations on them."""

from dragn_cache.ragged.bags import RaggedBags, offsets_of
from dragn_cache.ragged.segments import (
    segment_argmax,
    segment_attend,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_softmax,
    segment_sum,
)

__all__ = [
    "RaggedBags",
    "offsets_of",
    "segment_argmax",
    "segment_attend",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_softmax",
    "segment_sum",
]
