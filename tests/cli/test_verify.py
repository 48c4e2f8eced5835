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
