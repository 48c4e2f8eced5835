"""Pictures of results, drawn without a display and written as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dragn_cache.calibration import BINS, EDGES, Reliability

COLOURS = ("#33658a", "#f26419", "#758e4f", "#86429f", "#8c6d31")
SCORE_NAMES = {"auc_macro": "macro AUC", "map": "mAP", "f1_macro": "macro F1"}


def plot_comparison(
    path: Path,
    *,
    metrics: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    bag: Sequence[NDArray[np.uint8]],
    bag_title: str,
) -> None:
    """One picture of a comparison: a bag's images, the test scores, the validation losses.

    Args:
        path: the PNG to write.
        metrics: by method, its metrics.json.
        histories: by method, the rows of its history.
        bag: the images (H, W, 3) of one bag, to show what the data look like.
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


def plot_crossval(
    path: Path, summary: Sequence[Mapping[str, Any]], folds: Sequence[Mapping[str, Any]]
) -> None:
    """One picture of a cross-validation: each method's main scores, with intervals and tests.

    Args:
        path: the PNG to write.
        summary: the rows of summary.csv.
        folds: the rows of folds.csv.
    """
    names = {"accuracy": "accuracy", **SCORE_NAMES}
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(summary)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, len(names), sharey=True))
    for axes, (score, title) in zip(panels, names.items(), strict=True):
        for place, row in enumerate(summary):
            tests = [f[score] for f in folds if f["aggregator"] == row["aggregator"]]
            _show_tests(axes, place, [value for value in tests if value is not None])
            _show_mean(axes, place, row, score)
        axes.set_title(title, fontsize=10)
        if all(row[f"{score}_mean"] is None for row in summary):
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
    """Each test's score, below the mean, spread a little so that equal ones are seen."""
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


def _show_bag(figure: Any, bag: Sequence[NDArray[np.uint8]], title: str) -> None:
    figure.suptitle(title, fontsize=10)
    for axes, image in zip(np.atleast_1d(figure.subplots(1, len(bag))), bag, strict=True):
        axes.imshow(image)
        axes.set_axis_off()


def _show_scores(axes: Axes, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    width = 0.8 / len(metrics)
    for k, (method, splits) in enumerate(metrics.items()):
        test = splits["test"]
        for place, name in enumerate(SCORE_NAMES):
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
    axes.set_xticks(range(len(SCORE_NAMES)), list(SCORE_NAMES.values()))
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


def plot_reliability(path: Path, found: Reliability, title: str) -> None:
    """A reliability diagram: how often each bin's probabilities were true, and how many there were.

    Args:
        path: the PNG to write.
        found: the bins.
        title: whose probabilities they are.
    """
    figure = Figure(figsize=(5.2, 6.2))
    FigureCanvasAgg(figure)
    margins = {"left": 0.12, "right": 0.97, "bottom": 0.08, "top": 0.92, "hspace": 0.06}
    gaps, counts = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True, gridspec_kw=margins)
    filled = found.counts > 0
    middles, width = (EDGES[:-1] + EDGES[1:]) / 2, 0.92 / BINS
    gaps.plot([0, 1], [0, 1], color="#222222", linewidth=1, linestyle="--")
    gaps.bar(middles[filled], found.frequency[filled], width, color=COLOURS[0], alpha=0.35)
    gaps.plot(found.confidence[filled], found.frequency[filled], "o-", color=COLOURS[0])
    gaps.set_ylim(0, 1.02)
    gaps.set_ylabel("share that is true")
    gaps.set_title(f"{title}\nexpected calibration error {found.error:.3f}", fontsize=10)
    counts.bar(middles[filled], found.counts[filled], width, color=COLOURS[0])
    for x, count in zip(middles[filled], found.counts[filled], strict=True):
        counts.text(x, count, f"{count}", ha="center", va="bottom", fontsize=6)
    counts.set_yscale("log")
    counts.yaxis.set_ticks([], minor=False)
    counts.yaxis.set_ticks([], minor=True)
    counts.set_ylim(0.7, 4 * found.counts.max())
    counts.set_xlim(0, 1)
    counts.set_xlabel("probability (dots: mean of the bin; dashed: as it should be)")
    counts.set_ylabel("how many (log)")
    for axes in (gaps, counts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
