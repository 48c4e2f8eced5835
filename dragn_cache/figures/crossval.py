"""Figure of a cross-validation, drawn without a display and written as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dragn_cache.figures.style import COLOURS
from dragn_cache.scoring.scores import ACCURACY, MAIN_SCORES


def plot_crossval(
    path: Path | BinaryIO, summary: Sequence[Mapping[str, Any]], folds: Sequence[Mapping[str, Any]]
) -> None:
    """Draw a cross-validation: each method's main scores, with intervals and the single tests.

    Args:
        path: the PNG to write, or an open file.
        summary: the rows of summary.csv.
        folds: the rows of folds.csv.
    """
    scores = (ACCURACY, *MAIN_SCORES)
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(summary)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, len(scores), sharey=True))
    for axes, score in zip(panels, scores, strict=True):
        for place, row in enumerate(summary):
            tests = [f[score.name] for f in folds if f["aggregator"] == row["aggregator"]]
            _show_tests(axes, place, [value for value in tests if value is not None])
            _show_mean(axes, place, row, score.name)
        axes.set_title(score.label, fontsize=10)
        if all(row[f"{score.name}_mean"] is None for row in summary):
            axes.set_xticks([])
            axes.text(0.5, 0.5, "undefined", ha="center", transform=axes.transAxes, fontsize=9)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(summary)), [row["aggregator"] for row in summary])
    panels[0].set_ylim(len(summary) - 0.4, -0.6)
    text = "mean over folds and seeds, 95 % bootstrap interval over bags; grey: each test fold"
    figure.supxlabel(text, fontsize=9)
    figure.savefig(path, dpi=110)


def _show_tests(axes: Axes, place: int, values: Sequence[float]) -> None:
    """Draw each test's score below the mean, at slightly different heights to show equal ones."""
    height = place + 0.26 + 0.09 * np.cos(2.4 * np.arange(len(values)))
    axes.plot(values, height, ".", color="#aaaaaa", markersize=3.5, zorder=1)


def _show_mean(axes: Axes, place: int, row: Mapping[str, Any], score: str) -> None:
    mean, low, high = (row[f"{score}_{part}"] for part in ("mean", "low", "high"))
    if mean is None:
        return
    colour = COLOURS[0]
    if low is not None:
        axes.plot([low, high], [place, place], color=colour, linewidth=2, zorder=2)
    axes.plot(mean, place, "o", color=colour, markersize=5, zorder=3)
    axes.annotate(
        f"{mean:.3f}", (mean, place), (0, 6), textcoords="offset points", ha="center", fontsize=8
    )
