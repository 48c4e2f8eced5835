"""``dragn-cache check``."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import ok, run
from conftest import write_dataset


def test_check_tells_a_clean_set_from_a_faulty_one(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [2, 3])
    assert "2 bags, 5 instances, 5 images, 3 labels (multilabel): 0 faults" in ok("check", folder)
    (folder / "img" / "001_2.png").write_bytes(b"")
    result = run("check", folder, "--json")
    assert result.exit_code == 1
    (fault,) = json.loads(result.stdout)["faults"]
    assert (fault["kind"], fault["file"], fault["line"]) == ("unreadable-image", "instances.csv", 6)
    assert "instances.csv:6: unreadable-image" in run("check", folder).stdout
