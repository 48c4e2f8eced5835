"""``dragn-cache verify``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from command_line import EXTRACT, ok, refused, run


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
