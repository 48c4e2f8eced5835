"""``dragn-cache demo``."""

from __future__ import annotations

from pathlib import Path

from command_line import ok, run


def test_the_demo_ends_with_a_table_a_figure_and_what_to_do_next(tmp_path: Path) -> None:
    text = ok("demo", "--out", tmp_path / "demo", "--bags", 40)
    assert "dragn-cache extract --dataset my_data/" in text
    for method in ("L3Agg", "mean", "max"):
        assert method in text
        assert (tmp_path / "demo" / "runs" / method / "metrics.json").is_file()
    mine = tmp_path / "demo" / "runs" / "mine"
    mine.mkdir()
    ok("demo", "--out", tmp_path / "demo", "--bags", 40)
    assert mine.is_dir()
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 20_000


def test_the_demo_removes_no_runs_but_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "runs" / "mean" / "thesis.doc"
    mine.parent.mkdir(parents=True)
    mine.touch()
    result = run("demo", "--out", tmp_path, "--bags", 40)
    assert result.exit_code == 2
    assert "expected a new folder" in " ".join(result.stderr.split())
    assert mine.exists()
