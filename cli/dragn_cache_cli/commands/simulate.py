"""``dragn-cache simulate``: write the simulated fluorescence data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def simulate(
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    bags: Annotated[int, typer.Option(help="Number of bags.")] = 300,
    seed: Annotated[int, typer.Option(help="Same seed, same files.")] = 0,
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of a field in pixels.")] = "96x96",
) -> None:
    """Write a simulated fluorescence data set: PNG files and a manifest.

    Example: dragn-cache simulate --out sim --bags 300 --seed 0
    """
    from dragn_cache.backbone_input import parse_size
    from dragn_cache.datasets.simulated import simulate as write
    from dragn_cache_cli import screen

    with screen.progress_bar("simulating", "bags") as progress:
        folder = write(
            out,
            bags=bags,
            seed=seed,
            size=parse_size(size),
            progress=lambda done: progress(done, bags),
        )
    screen.out.print(f"{folder}: {bags} bags", markup=False, soft_wrap=True)
    command = f"dragn-cache extract --dataset {folder} --weights random --out {folder}.features"
    screen.note(f"next: {command}")
