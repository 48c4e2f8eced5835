"""Figure that compares runs: a bag, test scores with intervals, validation losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dragn_cache.figures.style import COLOURS
from dragn_cache.scoring.scores import MAIN_SCORES


def plot_comparison(
    path: Path | BinaryIO,
    *,
    metrics: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    bag: Sequence[NDArray[np.uint8]],
    bag_title: str,
) -> None:
    """Draw a comparison of methods: a bag's images, the test scores, the validation losses.

    Args:
        path: the PNG to write, or an open file.
        metrics: by method, its metrics.json.
        histories: by method, the rows of its history.
        bag: the images (H, W, 3) of one bag, as an example of the data.
        bag_title: text above them.
    """
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.9)))
    _show_bag(above, bag, bag_title)
    scores, losses = below.subplots(1, 2, width_ratios=(1.5, 1))
    _show_scores(scores, metrics)
    _show_losses(losses, histories)
    figure.savefig(path, dpi=110)


def _show_bag(figure: Any, bag: Sequence[NDArray[np.uint8]], title: str) -> None:
    figure.suptitle(title, fontsize=10)
    for axes, image in zip(np.atleast_1d(figure.subplots(1, len(bag))), bag, strict=True):
        axes.imshow(image)
        axes.set_axis_off()


def _show_scores(axes: Axes, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    width = 0.8 / len(metrics)
    for k, (method, splits) in enumerate(metrics.items()):
        test = splits["test"]
        for place, name in enumerate(score.name for score in MAIN_SCORES):
            score, interval = test[name], test["intervals"][name]
            if score is None:
                continue
            x = place + (k - (len(metrics) - 1) / 2) * width
            colour = COLOURS[k % len(COLOURS)]
            axes.bar(x, score, width * 0.9, color=colour, label=method if place == 0 else None)
            text_at = score
            if interval is not None:
                spread = [[max(0.0, score - interval[0])], [max(0.0, interval[1] - score)]]
                axes.errorbar(x, score, yerr=spread, color="#222222", capsize=3, linewidth=1)
                text_at = interval[1]
            axes.text(x, text_at + 0.01, f"{score:.3f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(MAIN_SCORES)), [score.label for score in MAIN_SCORES])
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("test score, with 95 % bootstrap interval over bags")
    axes.legend(frameon=False, ncols=len(metrics), loc="upper center", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _show_losses(axes: Axes, histories: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    for k, (method, rows) in enumerate(histories.items()):
        epochs = [row["epoch"] for row in rows]
        losses = [row["validation_loss"] for row in rows]
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(epochs, losses, color=colour, label=method)
        best = int(np.argmin(losses))
        axes.plot(epochs[best], losses[best], "o", color=colour, markersize=5)
    axes.set_xlabel("epoch (dot: the one kept)")
    axes.set_ylabel("validation loss")
    axes.spines[["top", "right"]].set_visible(False)
