"""``dragn-cache recipes``, and a recipe in training."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from pathlib import Path

import pytest
from command_line import ok, refused


def test_recipes_are_listed_and_applied(store: Path, tmp_path: Path) -> None:
    recipes = json.loads(ok("recipes", "--json"))
    assert recipes["dragn-fly"]["lr"] == {"value": 1e-4, "source": "DRAGN, experiments on HPA"}
    assert re.search(r"dragn-fly +dragn +13 ", ok("recipes"))
    assert "options.unit" in ok("recipes", "dragn-fly")
    assert re.search(r"options.embed +256,128,64 ", ok("recipes", "abmil"))
    assert list(json.loads(ok("recipes", "frn", "--json"))) == ["frn"]
    assert "did you mean frn" in refused("recipes", "frm")
    table = tmp_path / "stages.csv"
    given = ("--recipe", "dragn-fly", "--epochs", 2, "--loss", "frn", "--loss-option", "anneal=3")
    steps = ("--schedule", "step", "--schedule-option", "milestones=1", "--patience", 5)
    base = ("train-agg", "--store", store, "--out", tmp_path / "r")
    ok(*base, *given, *steps)
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())["train"]
    found = {name: config[name] for name in ("lr", "batch_size", "epochs", "loss", "patience")}
    assert found == {"lr": 1e-4, "batch_size": 4, "epochs": 2, "loss": "frn", "patience": 5}
    assert config["options"] == {"unit": "L1Agg"}
    assert config["loss_options"] == {"anneal": 3}
    assert config["schedule_options"] == {"milestones": 1}
    with (tmp_path / "r" / "history.csv").open() as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx([1e-4, 1e-5])
    table.write_text("label,stages\n")
    base = ("train-agg", "--store", store, "--out", tmp_path / "q")
    assert "got no row" in refused(*base, "--stage-mask", "both", "--stage-table", table)
    assert "--stage-table as well" in refused(*base, "--stage-mask", "both")
    assert "--loss-option: expected name=value" in refused(*base, "--loss-option", "gamma")
    assert "loss: expected a known loss, got 'hinge'" in refused(*base, "--loss", "hinge")
    assert not (tmp_path / "q").exists()
