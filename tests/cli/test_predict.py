"""``dragn-cache predict``."""

from __future__ import annotations

import csv
from pathlib import Path

from command_line import EXTRACT, ok, run
from conftest import write_dataset


def test_predicting_repeats_the_runs_probabilities(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    text = ok("predict", trained, "--store", store, "--out", tmp_path / "p")
    assert "auc_macro over 20 bags" in text

    def columns(path: Path) -> list[list[str]]:
        with path.open() as file:
            return [[r["bag_id"], r["p_actin"], r["p_golgi"]] for r in csv.DictReader(file)]

    assert columns(tmp_path / "p" / "predictions.csv") == columns(trained / "predictions.csv")


def test_predicting_bags_with_other_labels_gives_no_scores(trained: Path, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [2, 1], seed=9)
    (folder / "dataset.toml").write_text('name = "other"\ntask = "multilabel"\n')
    (folder / "bags.csv").write_text("bag_id,labels\n000,strange\n001,odd\n")
    ok("extract", "--dataset", folder, "--out", tmp_path / "s", *EXTRACT)
    result = run("predict", trained, "--store", tmp_path / "s", "--out", tmp_path / "p")
    assert result.exit_code == 0
    assert "predictions without scores" in result.stderr
    with (tmp_path / "p" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["y_actin"] for r in rows] == ["", ""]
    assert all(0 < float(r["p_actin"]) < 1 for r in rows)
