"""``dragn-cache demo``: the whole way on simulated images, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.scoring.scores import MAIN_SCORES

NEXT = """next, on your own images:
  dragn-cache check my_data/                        # a folder with dataset.toml, or one CSV
  dragn-cache extract --dataset my_data/ --backbone resnet50 --out my.features
  dragn-cache train-agg --store my.features --unit L3Agg --out runs/mine"""


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("demo"),
    bags: Annotated[int, typer.Option(help="Number of simulated bags.", min=40)] = 300,
    seed: Annotated[int, typer.Option(help="Of the simulated images.")] = 0,
) -> None:
    """Simulate images, check them, extract features, train L3Agg, mean and max, and compare.

    Needs no download: the backbone's weights are random.

    Example: dragn-cache demo --out demo
    """
    from dragn_cache.demo import run_demo
    from dragn_cache_cli import screen

    result = run_demo(
        out,
        bags=bags,
        seed=seed,
        announce=lambda command: screen.out.print(f"$ {command}", markup=False, soft_wrap=True),
        bar=screen.progress_bar,
    )
    names = [score.name for score in MAIN_SCORES]
    rows = []
    for method, metrics in result.metrics.items():
        test = metrics["test"]
        scores = [screen.score_text(test[name], test["intervals"][name]) for name in names]
        rows.append((method, *scores, f"{result.seconds[method]:.1f} s"))
    screen.print_table(["aggregator", *names, "training"], rows, "test bags, 95 % intervals")
    screen.out.print(f"figure: {result.figure}", markup=False, soft_wrap=True)
    screen.out.print(NEXT, markup=False, soft_wrap=True)
