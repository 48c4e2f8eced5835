"""``dragn-cache simulate``: write the simulated fluorescence data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.datasets.config import SimulateConfig
from dragn_cache_cli.options import takes


@takes(SimulateConfig)
def simulate(
    config: SimulateConfig,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
) -> None:
    """Write a simulated fluorescence data set: PNG files and a manifest.

    Example: dragn-cache simulate --out sim --bags 300 --seed 0
    """
    from dragn_cache.datasets.simulated import simulate as write
    from dragn_cache_cli import screen

    with screen.progress_bar("simulating", "bags") as progress:
        folder = write(out, config, progress=lambda done: progress(done, config.bags))
    screen.say(f"{folder}: {config.bags} bags")
    command = f"dragn-cache extract --dataset {folder} --weights random --out {folder}.features"
    screen.note(f"next: {command}")
