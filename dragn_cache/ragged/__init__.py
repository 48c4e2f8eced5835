"""Ragged bags: many bags as one array of rows and their offsets, and what is computed on them."""

from dragn_cache.ragged.bags import RaggedBags

__all__ = ["RaggedBags"]
