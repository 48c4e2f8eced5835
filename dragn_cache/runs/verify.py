"""Comparing the files of a run with their digests."""

from __future__ import annotations

from pathlib import Path

from dragn_cache.checksums import CHECKSUMS, changed_files

FILES = (
    "checkpoint.pt",
    "config.toml",
    "splits.csv",
    "history.csv",
    "selection.csv",
    "predictions.csv",
    "labels.csv",
    "instances.csv",
    "metrics.json",
)


def is_run(folder: Path) -> bool:
    """Whether a folder is what train-agg, predict, evaluate or explain write."""
    return any((folder / name).is_file() for name in (CHECKSUMS, "checkpoint.pt"))


def verify_files(run: Path) -> list[str]:
    """A line for each file of a run that is lost or not as it was written."""
    if not (run / CHECKSUMS).exists():
        return [f"{run / CHECKSUMS}: none; runs of older versions have no digests, others lost it"]
    return [f"{run / name}: lost, or not as it was written" for name in changed_files(run, FILES)]
