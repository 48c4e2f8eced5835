"""Settings of the simulated data set, and of the demonstration that is made of it."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from dragn_cache.backbone_input import parse_size, size_text
from dragn_cache.options import MAX_SEED, Settings, setting

BAGS = 300
MIN_SIDE_PX = 32  # smaller fields have no room for a cell

Side = Annotated[int, Ge(MIN_SIDE_PX)]


class SimulateConfig(Settings):
    """Settings of a simulated data set."""

    bags: int = setting(BAGS, ge=1, help="Number of bags.")
    seed: int = setting(0, ge=0, le=MAX_SEED, help="Same seed, same files.")
    size: tuple[Side, Side] = setting(
        (96, 96),
        help="Height and width of a field in pixels.",
        expected=f"[height, width] in pixels, each of at least {MIN_SIDE_PX}",
        metavar="HEIGHTxWIDTH",
        parse=parse_size,
        text=size_text,
    )


class DemoConfig(SimulateConfig):
    """Settings of the demonstration: enough bags to train, validate and test on."""

    bags: int = setting(BAGS, ge=40, help="Number of simulated bags.")
