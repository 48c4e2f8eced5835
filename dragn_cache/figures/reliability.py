"""Reliability diagrams."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dragn_cache.figures.style import COLOURS
from dragn_cache.scoring.calibration import BINS, EDGES, Reliability


def plot_reliability(path: Path, bins: Reliability, title: str) -> None:
    """Draw a reliability diagram: each bin's share of positives and its count.

    Args:
        path: the PNG to write.
        bins: counts, mean probability and share of positives of each bin.
        title: the run and split of the probabilities.
    """
    figure = Figure(figsize=(5.2, 6.2))
    FigureCanvasAgg(figure)
    margins = {"left": 0.12, "right": 0.97, "bottom": 0.08, "top": 0.92, "hspace": 0.06}
    gaps, counts = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True, gridspec_kw=margins)
    filled = bins.counts > 0
    middles, width = (EDGES[:-1] + EDGES[1:]) / 2, 0.92 / BINS
    gaps.plot([0, 1], [0, 1], color="#222222", linewidth=1, linestyle="--")
    gaps.bar(middles[filled], bins.frequency[filled], width, color=COLOURS[0], alpha=0.35)
    gaps.plot(bins.confidence[filled], bins.frequency[filled], "o-", color=COLOURS[0])
    gaps.set_ylim(0, 1.02)
    gaps.set_ylabel("share that is true")
    gaps.set_title(f"{title}\nexpected calibration error {bins.error:.3f}", fontsize=10)
    counts.bar(middles[filled], bins.counts[filled], width, color=COLOURS[0])
    for x, count in zip(middles[filled], bins.counts[filled], strict=True):
        counts.text(x, count, f"{count}", ha="center", va="bottom", fontsize=6)
    counts.set_yscale("log")
    counts.yaxis.set_ticks([], minor=False)
    counts.yaxis.set_ticks([], minor=True)
    counts.set_ylim(0.7, 4 * bins.counts.max())
    counts.set_xlim(0, 1)
    counts.set_xlabel("probability (dots: mean of the bin; dashed: as it should be)")
    counts.set_ylabel("how many (log)")
    for axes in (gaps, counts):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
