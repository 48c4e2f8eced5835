"""``dragn-cache simulate``."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import ok


def test_simulate_then_extract_with_its_defaults(tmp_path: Path) -> None:
    ok("simulate", "--out", tmp_path / "sim", "--bags", 4, "--seed", 1)
    ok("check", tmp_path / "sim")
    ok("extract", "--dataset", tmp_path / "sim", "--weights", "random", "--out", tmp_path / "s")
    facts = json.loads(ok("info", tmp_path / "s", "--json"))
    assert facts["provenance"]["features"]["backbone"] == "resnet18"
    assert facts["provenance"]["features"]["preprocessing"]["size"] == [96, 96]
