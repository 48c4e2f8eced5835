"""``dragn-cache train-agg``."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ok, refused


def test_training_writes_a_run(store: Path, trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert list(metrics) == ["train", "validation", "test"]
    assert sum(m["bags"] for m in metrics.values()) == 20
    with (trained / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "bag_id",
        "split",
        "y_actin",
        "y_nucleus",
        "y_golgi",
        "p_actin",
        "p_nucleus",
        "p_golgi",
        "d_actin",
        "d_nucleus",
        "d_golgi",
    ]
    assert len(rows) == 20
    printed = ok(
        "train-agg",
        "--store",
        store,
        "--out",
        store.parent / "j",
        "--epochs",
        2,
        "--unit",
        "L1Agg",
        "--json",
    )
    assert json.loads(printed) == metrics


def test_another_table_of_bags(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "other.csv"
    ids = [f"0{k:02d}" for k in range(12)]
    splits = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    table.write_text(
        "bag_id,labels,split\n"
        + "".join(
            f"{b},{'left' if k % 2 else 'right;left'},{s}\n"
            for k, (b, s) in enumerate(zip(ids, splits, strict=True))
        )
    )
    out = tmp_path / "r"
    ok(
        "train-agg",
        "--store",
        store,
        "--bags",
        table,
        "--aggregator",
        "max",
        "--epochs",
        1,
        "--out",
        out,
    )
    with (out / "splits.csv").open() as file:
        rows = {r["bag_id"]: r["split"] for r in csv.DictReader(file)}
    assert rows == dict(zip(ids, [s.replace("val", "validation") for s in splits], strict=True))
    assert "y_left" in (out / "predictions.csv").read_text()
    table.write_text("bag_id,labels\n0000,left\n")
    assert "did you mean" in refused(
        "train-agg", "--store", store, "--bags", table, "--out", tmp_path / "q"
    )


def test_training_needs_a_label(store: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("bag_id,labels\n" + "".join(f"0{k:02d},\n" for k in range(12)))
    line = refused("train-agg", "--store", store, "--bags", table, "--out", tmp_path / "r")
    assert "empty labels for all 12 bags" in line


def test_mistakes_in_training_are_one_line(store: Path, tmp_path: Path) -> None:
    base = ["train-agg", "--store", store, "--out", tmp_path / "r"]
    assert "expected L1Agg, L2Agg or L3Agg" in refused(*base, "--unit", "L4Agg")
    assert "did you mean mean" in refused(*base, "--aggregator", "men")
    assert "known option, got 'unit'" in refused(*base, "--aggregator", "mean", "--unit", "L1Agg")
    assert "name=value" in refused(*base, "--option", "bn")
    assert "--pos-weight: expected a number from 0 to 1000000 or balanced, got 'even'" in refused(
        *base, "--pos-weight", "even"
    )
    assert (
        "--shuffle-seed: expected a whole number from 0 to 9223372036854775807, got -1"
        in refused(*base, "--shuffle-seed", -1)
    )
    assert "did you mean gap" in refused(*base, "--tap", "gp")
    assert "expected auto or a size with its unit, as 8GB" in refused(*base, "--memory", "much")
    assert "no such folder" in refused("train-agg", "--store", tmp_path / "none")
    assert "no such folder" in refused("info", tmp_path / "none")
    assert "no such folder" in refused(
        "predict", tmp_path / "x", "--store", store, "--out", tmp_path / "p"
    )
    assert not (tmp_path / "r").exists()


def test_an_error_in_code_of_ones_own_names_its_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_faulty.py").write_text(
        "from dragn_cache.aggregators.mean import Mean\n"
        "class Faulty(Mean):\n"
        "    def aggregate(self, bags):\n"
        "        return self.vectors(bags).median_of_means()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    said = refused("train-agg", "--store", store, "--aggregator", "my_faulty:Faulty", "--out", "r")
    assert f"error: {tmp_path / 'my_faulty.py'}:4: AttributeError" in said
    assert "correct it with the traceback that DRAGN_CACHE_DEBUG=1 shows" in said


def test_a_class_of_ones_own_in_the_working_directory(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_half.py").write_text(
        "from dragn_cache.aggregators import Aggregated\n"
        "from dragn_cache.aggregators.mean import Mean\n"
        "class Half(Mean):\n"
        "    def aggregate(self, bags):\n"
        "        return Aggregated(super().aggregate(bags).embedding / 2, None)\n"
    )
    monkeypatch.chdir(tmp_path)

    def typed(*args: object) -> str:
        """A fresh process, whose own path lacks the working directory, as the program's does."""
        command = [sys.executable, "-P", "-c", "from dragn_cache_cli.app import main; main()"]
        done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    name, short = "my_half:Half", ("--epochs", 1, "--intervals", 0)
    assert "my_half:Half" in typed("aggregators", name)
    typed("train-agg", "--store", store, "--aggregator", name, *short, "--out", "r")
    typed("predict", "r", "--store", store, "--out", "p", "--allow-class", name)
    assert (tmp_path / "p" / "metrics.json").is_file()
    args = ["--aggregator", f"{name},mean", "--folds", 3, "--seeds", 1, "--jobs", 2, *short]
    summary = json.loads(typed("crossval", "--store", store, *args, "--out", "cv", "--json"))
    assert summary["failed"] == []
    assert [row["trainings"] for row in summary["summary"]] == [3, 3]
