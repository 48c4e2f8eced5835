"""Colours, the same in all figures."""

from __future__ import annotations

COLOURS = ("#33658a", "#f26419", "#758e4f", "#86429f", "#8c6d31")
