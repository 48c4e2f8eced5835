"""``dragn-cache demo``: the whole way on simulated images, in a few minutes."""

from __future__ import annotations


def demo() -> None:
    """x"""
