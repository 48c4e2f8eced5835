"""``dragn-cache extract``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import EXTRACT, ok, refused, run
from conftest import write_dataset


def test_extract_reports_goes_on_and_refuses(data: Path, store: Path) -> None:
    again = ok("extract", "--dataset", data, "--out", store, *EXTRACT)
    assert "complete, nothing to compute" in again
    line = refused("extract", "--dataset", data, "--out", store, *EXTRACT, "--dtype", "float32")
    assert "numerics.dtype" in line


def test_skipped_inputs_give_exit_code_1(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [2, 3])
    (folder / "img" / "001_2.png").write_bytes(b"")
    out = tmp_path / "s"
    assert "0 bytes" in refused("extract", "--dataset", folder, "--out", out, *EXTRACT)
    for _ in range(2):
        result = run("extract", "--dataset", folder, "--out", out, *EXTRACT, "--on-error", "skip")
        assert result.exit_code == 1
        assert "1 inputs were not used" in result.stderr


MISTAKES = {
    "unknown backbone": (["--backbone", "resnet19"], r"did you mean .*resnet18"),
    "unknown tap": (["--taps", "featurs"], "did you mean features"),
    "bad size": (["--size", "224by224"], "--size: expected HEIGHTxWIDTH"),
    "bad mean": (["--mean", "0.5,0.5"], "--mean: expected one number or three"),
    "no weights file": (["--weights", "lost.pth"], "lost.pth"),
    "unknown channel": (["--rgb", "violet"], "violet"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "wide size": (
        ["--size", "224x8193"],
        r"--size: expected \[height, width\] in pixels, each from",
    ),
    "mean in 0 to 255": (["--mean", "123"], "--mean: expected three numbers from 0 to 1, got"),
    "bad intensity": (["--intensity", "5:1"], "--intensity: expected LOW below HIGH"),
    "views alone": (["--views", "2"], "--augment: .*; give --augment flip,.* or leave out --views"),
    "two channels": (["--rgb", "red,blue"], "--rgb: .* or take any number with --channels average"),
    "unknown data set": (["--dataset", "flyexpres"], "flyexpress"),
    "no batch": (
        ["--batch-size", "0"],
        "--batch-size: expected a whole number of at least 1, got 0",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line_and_writes_nothing(data: Path, tmp_path: Path, mistake: str) -> None:
    args, message = MISTAKES[mistake]
    line = refused("extract", "--dataset", data, "--out", tmp_path / "s", *EXTRACT, *args)
    assert re.search(message, line), line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_its_code_and_the_run_goes_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = write_dataset(tmp_path / "d", [8] * 6)
    out = tmp_path / "s"
    program = Path(sys.executable).with_name("dragn-cache")
    args = ["extract", "--dataset", folder, "--out", out, *EXTRACT[:-2], "--part-instances", "8"]
    command = [program, *args, "--workers", "2", "--batch-size", "4", "--size", "128"]
    process = subprocess.Popen(
        [str(a) for a in command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that a shell runs in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not list((out / "parts").glob("0*")):
        assert process.poll() is None
        time.sleep(0.01)
    if number == signal.SIGINT:  # Ctrl-C reaches the whole foreground group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert subprocess.run([str(a) for a in command], check=False).returncode == 0
    assert run("verify", out).exit_code == 0
    assert not list((out / "parts").glob(".*"))
