"""README and docs: their Python runs, their commands parse, and README's run in order."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from conftest import write_dataset
from dragn_cache_cli.app import app
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# What makes README's commands small and free of downloads: the last of an option counts.
SMALL = {
    "extract": "--backbone resnet18 --weights random:0 --size 32x32 --workers 0",
    "doctor": "--backbone resnet18 --weights random:0 --size 32x32 --workers 0",
    "taps": "--size 64x64",
    "train-agg": "--epochs 1 --intervals 20",
    "crossval": "--epochs 1 --folds 3 --seeds 1 --jobs 1 --intervals 20",
}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language; "" for those that name none."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The command lines of a page, without their comments."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    calls = (re.sub(r"\s#.*", "", line).strip() for line in lines)
    return [call.removeprefix("$ ") for call in calls if re.match(r"(\$ )?dragn-cache ", call)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name_of)
def test_every_command_line_is_one(page: Path) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    for line in commands(page):
        _, *words = shlex.split(line)
        context = typer.Context(group)
        name, command, rest = group.resolve_command(context, words)
        assert command is not None, line
        command.make_context(name, list(rest))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where README's commands run: a data set, another one, and features of another tool."""
    path = tmp_path_factory.mktemp("readme")
    write_dataset(path / "my_data", [2, 1, 3] * 10)
    write_dataset(path / "new_data", [1, 2] * 4, seed=1)
    for table in ("bags.csv", "instances.csv"):
        rows = (path / "new_data" / table).read_text().splitlines(keepends=True)
        others = [rows[0], *("n" + row for row in rows[1:])]
        (path / "new_data" / table).write_text("".join(others))
    for labels in ("other_labels.csv", "labels.csv"):
        shutil.copy(path / "my_data" / "bags.csv", path / labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        call("dragn-cache extract --dataset new_data --out new.features")
        call("dragn-cache extract --dataset new_data --format zarr --out zarr.features")
        yield path


def call(line: str) -> str:
    """What a command line prints; it must succeed."""
    _, name, *words = shlex.split(line)
    result = CliRunner().invoke(app, [name, *words, *shlex.split(SMALL.get(name, ""))])
    assert result.exit_code == 0, (line, result.output, result.exception)
    return result.output


def test_the_readmes_commands_run_in_their_order(folder: Path) -> None:
    lines = commands(ROOT / "README.md")
    assert len(lines) > 10
    for line in lines:
        if line.startswith("dragn-cache import clam_features"):
            call("dragn-cache export my.features --layout clam --tap avgpool --out clam_features")
        call(line)
    for made in ("runs/mine/metrics.json", "cv/summary.csv", "mine-torchmil", "mine-explained"):
        assert (folder / made).exists(), made


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_every_python_block_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_folder = folder / "python"
    test_folder.mkdir(exist_ok=True)
    for name, store in (("my.features", "new.features"), ("new.features", "new.features")):
        if not (test_folder / name).exists():
            shutil.copytree(folder / store, test_folder / name)
    monkeypatch.chdir(test_folder)
    for block in blocks(page, "python"):
        store = "zarr.features" if "zarr.open" in block else "new.features"
        shutil.rmtree("NAME.features", ignore_errors=True)
        shutil.copytree(folder / store, "NAME.features")
        names: dict[str, object] = {"crop": np.zeros((3, 41, 53), np.uint8)}
        exec(compile(block, name_of(page), "exec"), names)
        assert set(names) - {"crop", "__builtins__"}
