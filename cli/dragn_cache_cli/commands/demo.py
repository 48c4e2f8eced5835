"""``dragn-cache demo``: the whole way on simulated images, in a few minutes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from dragn_cache.datasets.config import DemoConfig
from dragn_cache.options import value_text
from dragn_cache.scoring.scores import MAIN_SCORES
from dragn_cache_cli.options import takes

NEXT = """next, on your own images:
  dragn-cache check my_data/                        # a folder with dataset.toml, or one CSV
  dragn-cache extract --dataset my_data/ --backbone resnet50 --out my.features
  dragn-cache train-agg --store my.features --unit L3Agg --out runs/mine"""


@takes(DemoConfig, leave_out=["size"])
def demo(
    config: DemoConfig,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("demo"),
) -> None:
    """Simulate images, check them, extract features, train L3Agg, mean and max, and compare.

    Needs no download: the backbone's weights are random.

    Example: dragn-cache demo --out demo
    """
    from dragn_cache.demo import run_demo
    from dragn_cache_cli import screen

    result = run_demo(out, config, announce=_announce, bar=screen.progress_bar)
    names = [score.name for score in MAIN_SCORES]
    rows = []
    for method, metrics in result.metrics.items():
        test = metrics["test"]
        scores = [screen.score_text(test[name], test["intervals"][name]) for name in names]
        rows.append((method, *scores, f"{result.seconds[method]:.1f} s"))
    screen.print_table(["aggregator", *names, "training"], rows, "test bags, 95 % intervals")
    screen.say(f"figure: {result.figure}")
    for line in NEXT.splitlines():
        screen.say(line)


def _announce(command: str, folder: Path | None, settings: Mapping[str, object]) -> None:
    from dragn_cache_cli import screen

    words = [] if folder is None else [str(folder)]
    for name, value in settings.items():
        words += [f"--{name}", value_text(value)]
    screen.say(f"$ {shlex.join(['dragn-cache', command, *words])}")
