"""``dragn-cache aggregators``."""

from __future__ import annotations

import json
import re

from command_line import ok, refused


def test_aggregators_are_listed_with_their_options() -> None:
    assert json.loads(ok("aggregators", "--json"))["dragn"]["order_sensitive"] is True
    assert "dragn" in ok("aggregators")
    options = json.loads(ok("aggregators", "vlad", "--json"))["vlad"]["options"]
    assert (options["svm"], options["pca"]) == ("linear", None)
    told = ok("aggregators", "clam_mb")
    assert re.search(r"attn_dim +a whole number of at least 1 +256 +Width of the gated", told)
    assert "labels " not in told.split("--option")[1]
    assert "did you mean clam_mb" in refused("aggregators", "clam_mbb")
