"""Ten kills of the script tests/kills.py, which makes as many as one likes."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import Kills

from dragn_cache.store import FORMATS


@pytest.mark.parametrize(("processes", "kills"), [(1, 2), (3, 3)])
@pytest.mark.parametrize("format", list(FORMATS))
def test_killed_at_random_moments_the_store_becomes_the_same_bytes(
    tmp_path: Path, format: str, processes: int, kills: int
) -> None:
    done = list(Kills(tmp_path, format, processes, seed=0).counted(kills))
    assert len(done) == kills
    assert all(outcome.killed >= 1 for outcome in done)
