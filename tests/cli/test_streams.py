"""Standard streams that are full, closed, of another encoding, or whose reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-P", "-c", "from dragn_cache_cli.app import main; main()"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
PRINTS = [["--help"], ["--version"], ["info", "--help"], ["backbones"], ["check", "{data}"]]


def run_with(redirections: str, words: list[str], data: Path) -> subprocess.CompletedProcess[str]:
    """The program with redirections of a shell."""
    words = [word.format(data=data) for word in words]
    shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", *PROGRAM, *words]
    return subprocess.run(shell, capture_output=True, text=True, timeout=100)


@needs_full
@pytest.mark.parametrize("words", PRINTS, ids=" ".join)
def test_a_full_stdout_ends_in_one_line_and_exit_code_2(words: list[str], data: Path) -> None:
    done = run_with(">/dev/full", words, data)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "internal" not in done.stderr
    assert run_with(">/dev/full 2>/dev/full", words, data).returncode == 2


@needs_full
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(tmp_path: Path) -> None:
    assert run_with("2>/dev/full", ["info", str(tmp_path)], tmp_path).returncode == 2


@pytest.mark.parametrize("words", PRINTS, ids=" ".join)
def test_a_reader_that_has_gone_ends_the_program_quietly(words: list[str], data: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, *(word.format(data=data) for word in words)],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=100,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("words", PRINTS, ids=" ".join)
def test_closed_streams_are_as_good_as_dev_null(words: list[str], data: Path) -> None:
    done = run_with(">&-", words, data)
    assert (done.returncode, done.stderr) == (0, "")
    assert run_with("<&- >&- 2>&-", words, data).returncode == 0


def test_nothing_that_is_printed_goes_into_a_file_that_got_a_closed_streams_number(
    data: Path, tmp_path: Path
) -> None:
    words = ["simulate", "--bags", "1", "--out"]
    assert run_with("", [*words, str(tmp_path / "a")], data).returncode == 0
    assert run_with("<&- >&- 2>&-", [*words, str(tmp_path / "b")], data).returncode == 0
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_characters_that_an_encoding_lacks_are_escaped(store: Path) -> None:
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*PROGRAM, "info", store], capture_output=True, text=True, env=ascii_only, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\xd7" in done.stdout  # the × of a map's shape


def test_a_file_name_of_other_bytes_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    done = subprocess.run([*PROGRAM, "info", folder], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.endswith(
        "\\udcff': expected a name in UTF-8, got other bytes; rename the file or folder\n"
    )
