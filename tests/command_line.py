"""The command line as a person types it: its output, its exit code, its one line for a mistake."""

from __future__ import annotations

from dragn_cache_cli.app import app
from typer.testing import CliRunner, Result

# Bags of the data set that the commands share, and options that make its extraction small.
SIZES = [3, 1, 4, 2, 5, 1, 2, 3, 1, 4, 2, 1, 3, 2, 1, 2, 6, 1, 2, 3]
EXTRACT = ["--backbone", "squeezenet1_1", "--weights", "random", "--size", "64x64"]
EXTRACT += ["--workers", "0"]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ok(*args: object) -> str:
    """The output of a command, which must succeed."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: object) -> str:
    """The one line of a refusal."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "internal" not in lines[0]
    return lines[0]
