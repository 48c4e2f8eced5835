"""``dragn-cache info``."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import SIZES, ok


def test_info_shows_the_store(store: Path) -> None:
    facts = json.loads(ok("info", store, "--json"))
    assert (facts["bags"], facts["instances"], facts["missing_parts"]) == (20, sum(SIZES), [])
    assert [(t["name"], t["shape"]) for t in facts["taps"]] == [
        ("features", [512, 3, 3]),
        ("gap", [512]),
    ]
    text = ok("info", store)
    assert "20 bags, 49 instances" in text
    assert "complete" in text
    assert facts["digests"]["features"] in text
