"""Mutated bytes of every kind of file: a second for each boundary; `make fuzz` gives a minute."""

from __future__ import annotations

from fuzz import BOUNDARIES, fuzz


def test_a_second_of_mutated_bytes_for_each_boundary() -> None:
    """Never "internal", a traceback, a signal, too much memory or time, or a folder left behind."""
    reports = fuzz(list(BOUNDARIES), 1.0)
    assert {name: report.faults for name, report in reports.items()} == {n: [] for n in BOUNDARIES}
    # The sound files, and at least one other.
    assert all(report.cases > 1 for report in reports.values())
