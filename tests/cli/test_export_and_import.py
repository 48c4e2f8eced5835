"""``dragn-cache export`` and ``dragn-cache import``."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

from command_line import ok, refused, run


def test_features_go_out_and_come_back(store: Path, tmp_path: Path) -> None:
    text = ok("export", store, "--layout", "clam", "--out", tmp_path / "clam")
    assert re.search(r"clam: 20 bags as clam, tap gap, view 0$", text.strip())
    out = tmp_path / "again.features"
    text = ok("import", tmp_path / "clam", "--out", out, "--format", "zarr")
    assert "20 bags, 49 instances from clam, gap 512 float16; parts 1 of 1" in text
    assert "complete already" in ok("import", tmp_path / "clam", "--out", out, "--format", "zarr")
    facts = json.loads(ok("import", tmp_path / "clam", "--out", tmp_path / "b", "--json"))
    assert (facts["layout"], facts["bags"], facts["labelled"]) == ("clam", 20, True)
    assert facts["taps"] == [{"name": "gap", "shape": [512], "dtype": "float16"}]
    facts = json.loads(ok("export", out, "--layout", "hdf5", "--out", tmp_path / "x.h5", "--json"))
    assert (facts["layout"], facts["bags"], facts["taps"]) == ("hdf5", 20, ["gap"])
    ok("verify", out)
    weighted = ("--pos-weight", "balanced", "--shuffle-seed", 4)
    base = ("train-agg", "--store", out, "--aggregator", "mean", "--epochs", 1, *weighted)
    ok(*base, "--out", tmp_path / "r")
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())["train"]
    assert (config["pos_weight"], config["shuffle_seed"]) == ("balanced", 4)
    shutil.rmtree(out / "parts" / "00000.zarr" / "taps")
    result = run("verify", out, "--repair")
    assert result.exit_code == 1
    command = re.search(r"^dragn-cache import clam (.*)$", result.stderr, re.MULTILINE)
    assert command is not None
    assert "--layout clam --encoder squeezenet1_1 --format zarr --dtype float16" in command[1]
    ok("import", tmp_path / "clam", *shlex.split(command[1]))
    ok("verify", out)


def test_mistakes_in_and_out_are_one_line(store: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.h5").write_bytes(b"no HDF5")
    assert "a.h5: expected an HDF5 file" in refused(
        "import", tmp_path / "t", "--out", tmp_path / "s"
    )
    assert "got a store" in refused("import", store, "--out", tmp_path / "s")
    assert "expected a path where nothing is" in refused(
        "export", store, "--layout", "clam", "--out", tmp_path
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]
