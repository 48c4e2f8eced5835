"""Settings of a small extraction, and a folder as bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
    return replace(CONFIG, **changes)  # type: ignore[arg-type]


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }
