"""``dragn-cache verify``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from command_line import EXTRACT, ok, refused, run
from run_stores import make_bags, make_features, write_store


def test_verify_names_damage(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    ok("extract", "--dataset", data, "--out", out, *EXTRACT, "--part-instances", 20)
    assert "0 damaged bags" in ok("verify", out)
    part = out / "parts" / "00001.h5"
    part.write_bytes(part.read_bytes()[:-1000])
    result = run("verify", out, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert {row["part"] for row in found["damaged"]} == {"00001.h5"}
    assert "damaged: bag '008' in 00001.h5" in run("verify", out).stdout
    result = run("verify", out, "--repair")
    assert result.exit_code == 1
    assert f"moved aside: {out / 'damaged' / '00001.1.h5'}" in result.stdout
    command = result.stderr.strip().splitlines()[-1].replace("--dataset tiny", f"--dataset {data}")
    assert sorted(p.name for p in (out / "parts").iterdir()) == ["00000.h5", "00002.h5"]
    result = run("verify", out)
    assert result.exit_code == 1
    assert "missing: 00001.h5" in result.stdout
    assert "run the same extract command again" in refused(
        "train-agg", "--store", out, "--out", tmp_path / "r"
    )
    assert "parts 1 of 3" in ok(*shlex.split(command)[1:])
    ok("verify", out)


@pytest.mark.parametrize("features", [{}, {"preprocessing": None}])
def test_a_store_that_does_not_say_how_it_was_made_is_verified_all_the_same(
    tmp_path: Path, features: dict[str, None]
) -> None:
    bags = make_bags(31)
    out = tmp_path / "s"
    write_store(out, bags, make_features(bags), provenance={"features": features})
    assert "2 of 2 parts, 0 damaged bags" in ok("verify", out)
    assert json.loads(ok("verify", out, "--json"))["command"] is None
    (out / "parts" / "00001.h5").unlink()
    result = run("verify", out, "--repair")
    assert result.exit_code == 1
    assert "missing: 00001.h5" in result.stdout
    assert "repeat what has written this store" in result.stderr
    assert "dragn-cache extract" not in result.stderr


def test_a_whole_store_tells_how_it_was_made_as_well(store: Path) -> None:
    command = json.loads(ok("verify", store, "--json"))["command"]
    assert command.startswith("dragn-cache extract --dataset ")


def test_runs_and_cross_validations_are_verified(store: Path, tmp_path: Path) -> None:
    train = ("--store", store, "--aggregator", "mean", "--epochs", 1, "--intervals", 0)
    ok("train-agg", *train, "--out", tmp_path / "run")
    ok("crossval", *train, "--out", tmp_path / "study", "--folds", 3, "--seeds", 1, "--jobs", 1)
    assert ok("verify", tmp_path / "run") == f"{tmp_path / 'run'}: 0 damaged files\n"
    assert json.loads(ok("verify", tmp_path / "study", "--json")) == {"faults": []}
    for name, digit in (("run/metrics.json", "1"), ("study/trainings/mean/seed0-fold1.json", "3")):
        path = tmp_path / name
        text = path.read_text()
        assert digit in text
        path.write_text(text.replace(digit, "7", 1))
        result = run("verify", path.parents[len(path.relative_to(tmp_path).parts) - 2])
        assert result.exit_code == 1
        assert f"damaged: {path}: " in result.stdout
    for path in ("run/checkpoint.pt", "study/summary.csv"):
        (tmp_path / path).unlink()
    assert "run/checkpoint.pt: lost" in run("verify", tmp_path / "run").stdout
    assert "study/summary.csv: lost" in run("verify", tmp_path / "study").stdout


def test_what_is_none_of_these_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "expected a feature store, got a file" in refused("verify", tmp_path / "file")
    assert "got no store.json in it" in refused("verify", tmp_path)
    assert "got no such folder" in refused("verify", tmp_path / "none")
