"""``dragn-cache backbones``."""

from __future__ import annotations

import json

from command_line import ok


def test_backbones_are_listed() -> None:
    assert "resnet50" in ok("backbones")
    assert json.loads(ok("backbones", "--json"))["resnet50"] == {
        "map": "layer4",
        "vector": "avgpool",
    }
