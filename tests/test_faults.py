"""A few of the tries of tests/faults.py, which ``make faults`` makes by the hundred."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 2
COMMANDS = ("import", "export-torchmil", "train-agg", "crossval", "explain", "extract-update")


def test_after_a_fault_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    words = [sys.executable, Path(__file__).with_name("faults.py"), *COMMANDS]
    words += ["--kills", KILLS, "--disks", 1, "--limits", 1]
    paths = os.pathsep.join(p for p in (str(Path(__file__).parent), *sys.path) if p)
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(lines) == set(COMMANDS)
    for line in lines.values():
        assert int(re.findall(r"(\d+) of \d+ kills", line)[0]) == KILLS, line
    skipped = {line.partition("folders: ")[2].split(";")[0] for line in lines.values()}
    if skipped != {""}:
        pytest.skip(f"only kills and limits: {skipped}")
