"""Settings of a small extraction."""

from __future__ import annotations

from dragn_cache.extraction.config import ExtractConfig

CONFIG = ExtractConfig(
    backbone="shufflenet_v2_x0_5",
    weights="random:3",
    taps=("stage2", "gap"),
    size=(32, 48),
    part_instances=6,
    batch_size=8,
    workers=0,
)


def config(**changes: object) -> ExtractConfig:
    """`CONFIG` with some settings changed."""
    return CONFIG.replace(**changes)
