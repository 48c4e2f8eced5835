"""``dragn-cache evaluate``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from command_line import ok, refused


def test_evaluating_scores_the_runs_test_bags(store: Path, trained: Path, tmp_path: Path) -> None:
    scores = json.loads((trained / "metrics.json").read_text())["test"]
    printed = ok("evaluate", trained, "--out", tmp_path / "a", "--json")
    assert json.loads(printed) == {"test": scores}
    text = ok("evaluate", trained, "--store", store, "--split", "test", "--out", tmp_path / "b")
    assert f"test: {scores['bags']} bags, decided by default" in text
    assert re.search(rf"f1_macro +{scores['f1_macro']:.3f} \(", text)
    assert re.search(rf"actin +{scores['positives'][0]} ", text)
    text = ok("evaluate", trained, "--decision", "half", "--out", tmp_path / "c")
    assert "decided by half" in text
    assert "0.500" in text
    args = ("--store", store, "--out", tmp_path / "d")
    assert "of 20 that it was: '0" in refused("evaluate", trained, *args)
    assert "--decision: expected default, half, thresholds or top-K" in refused(
        "evaluate", trained, "--decision", "best", "--out", tmp_path / "d"
    )
    assert "got 'best'" in refused("train-agg", *args, "--decision", "best")
    assert "at most top-3 of 3" in refused("train-agg", *args, "--decision", "top-4")
    assert not (tmp_path / "d").exists()
