"""``dragn-cache demo``."""

from __future__ import annotations

from pathlib import Path

from command_line import ok


def test_the_demo_ends_with_a_table_a_figure_and_what_to_do_next(tmp_path: Path) -> None:
    text = ok("demo", "--out", tmp_path / "demo", "--bags", 40)
    assert "dragn-cache extract --dataset my_data/" in text
    for method in ("L3Agg", "mean", "max"):
        assert method in text
        assert (tmp_path / "demo" / "runs" / method / "metrics.json").is_file()
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 20_000
