"""``dragn-cache crossval``."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from command_line import ok, refused, run


def test_cross_validation_compares_methods(store: Path, tmp_path: Path) -> None:
    base = ["crossval", "--store", store, "--out", tmp_path / "cv", "--folds", 3, "--seeds", 1]
    base += ["--epochs", 1, "--jobs", 1, "--aggregator", "abmil[attn_dim=5],mean"]
    text = ok(*base, "--aggregator", "dragn[unit=L1Agg]")
    assert all(name in text for name in ("abmil-attn_dim=5", "mean", "dragn-L1Agg", "trainings"))
    tables = json.loads(ok(*base, "--json"))  # two of the three, trained already
    assert [row["aggregator"] for row in tables["summary"]] == ["abmil-attn_dim=5", "mean"]
    assert len(tables["comparison"]) == 4
    assert tables["failed"] == []
    assert "epochs is 1, asked for 2" in refused(*base, "--epochs", 2)


def test_a_recipe_gives_its_own_method_its_options(store: Path, tmp_path: Path) -> None:
    args = ["--recipe", "abmil", "--aggregator", "abmil,mean", "--epochs", 1, "--folds", 3]
    ok("crossval", "--store", store, "--out", tmp_path / "cv", "--seeds", 1, "--jobs", 1, *args)
    methods = tomllib.loads((tmp_path / "cv" / "config.toml").read_text())["methods"]
    first, second = methods.values()
    assert first["options"] == {"embed": [256, 128, 64], "attn_dim": 64}
    assert (second["options"], first["lr"], second["lr"]) == ({}, 5e-4, 5e-4)


def test_failed_trainings_of_a_cross_validation_give_exit_code_1(
    store: Path, tmp_path: Path
) -> None:
    args = ["--aggregator", "max", "--folds", 3, "--seeds", 1, "--epochs", 40, "--jobs", 1]
    args += ["--lr", 1000, "--weight-decay", 1000]
    result = run("crossval", "--store", store, "--out", tmp_path / "cv", *args)
    assert result.exit_code == 1, result.output
    assert "max, seed 0, fold 2 failed: epoch" in " ".join(result.stderr.split())
    assert "–" in result.stdout


def test_mistakes_in_cross_validating_are_one_line(store: Path, tmp_path: Path) -> None:
    base = ["crossval", "--store", store, "--out", tmp_path / "cv", "--aggregator"]
    assert "did you mean abmil" in refused(*base, "abmul")
    assert "names, as abmil,dragn[unit=L3Agg]" in refused(*base, "dragn[unit=L3Agg")
    assert "known option, got 'depth'" in refused(*base, "mean[depth=3]")
    assert "mean twice" in refused(*base, "mean,max,mean")
    assert "--folds: expected a whole number of at least 3, got 2" in refused(
        *base, "mean", "--folds", 2
    )
    assert "one group of bags for each of 99 folds" in refused(*base, "mean", "--folds", 99)
    assert "--device: expected cpu" in refused(*base, "mean", "--device", "gpu")
    assert "--decision" in refused(*base, "mean", "--decision", "top")
    assert "known recipe" in refused(*base, "mean", "--recipe", "abmul")
    assert not (tmp_path / "cv").exists()
