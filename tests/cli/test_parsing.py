"""Text of the command line as values."""

from __future__ import annotations

import pytest
from dragn_cache_cli.parsing import parse_aggregators


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("abmil, mean", (("abmil", {}), ("mean", {}))),
        ("mine.net:Net[a=1,2,b=x],max", (("mine.net:Net", {"a": (1, 2), "b": "x"}), ("max", {}))),
        ("dragn[unit=L3Agg,bn=false]", (("dragn", {"unit": "L3Agg", "bn": False}),)),
        ("mean[]", (("mean", {}),)),
    ],
)
def test_aggregators_with_options_as_text(text: str, found: object) -> None:
    assert parse_aggregators([text]) == found
