"""``dragn-cache taps``."""

from __future__ import annotations

import json

from command_line import ok


def test_taps_are_listed_with_their_shapes() -> None:
    taps = {t["name"]: t for t in json.loads(ok("taps", "resnet18", "--size", "128x320", "--json"))}
    assert taps["layer4"]["shape"] == [512, 4, 10]
    assert taps["layer4"]["bytes_fp16"] == 512 * 40 * 2
    assert taps["gap"]["shape"] == [512]
    assert "512×4×10" in ok("taps", "resnet18", "--size", "128x320")
    assert "resnet18 at 224×224" in ok("taps", "resnet18")
