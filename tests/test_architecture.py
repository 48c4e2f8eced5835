"""What the design promises about the shape of the code, held by tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# module → what importing it must not bring in
FORBIDDEN = {
    "dragn_cache.store": ("torch", "torchvision", "PIL", "dragn_cache.images"),
    "dragn_cache.interop": ("torch", "torchvision", "PIL", "anndata", "dragn_cache.runs"),
    "dragn_cache.manifest": ("torch", "PIL"),
    "dragn_cache.decode": ("torch", "h5py", "zarr", "pandas"),
    "dragn_cache.augment": ("torch", "h5py", "zarr", "pandas", "dragn_cache.store"),
    "dragn_cache.aggregators": ("torchvision", "PIL", "dragn_cache.backbones", "h5py"),
    "dragn_cache.train": ("torchvision", "PIL", "dragn_cache.backbones", "dragn_cache.images"),
    "dragn_cache.methods": ("torchvision", "PIL", "dragn_cache.backbones", "sklearn"),
    "dragn_cache.runs": ("torchvision", "PIL", "dragn_cache.backbones", "dragn_cache.images"),
    "dragn_cache.explain": ("torchvision", "PIL", "dragn_cache.backbones", "dragn_cache.images"),
    "dragn_cache.backbones": ("h5py", "zarr", "dragn_cache.manifest"),
    "dragn_cache_cli.app": ("torch", "h5py", "zarr", "PIL", "matplotlib", "sklearn"),
}


@pytest.mark.parametrize("module", list(FORBIDDEN))
def test_imports_go_one_way(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & set(FORBIDDEN[module])


def test_the_readmes_tree_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The tree") :]
    for path in sorted((ROOT / "dragn_cache").rglob("*.py")):
        if path.name != "__init__.py":
            assert re.search(rf"\b{re.escape(path.name)}\b", tree), path
    for path in sorted((ROOT / "cli" / "dragn_cache_cli").glob("*.py")):
        if path.name != "__init__.py":
            assert path.stem in tree, path


def test_the_readme_calls_only_commands_and_options_that_exist() -> None:
    from dragn_cache_cli.app import COMMANDS, app
    from typer.testing import CliRunner

    text = "\n".join(
        p.read_text() for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    )
    found = re.findall(r"^\s*(?:\$ )?dragn-cache ([a-z-]+)((?:[^\n\\]|\\\n)*)", text, re.MULTILINE)
    assert found
    for command, rest in found:
        assert command in COMMANDS, command
        help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"}).output
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", rest.split("#")[0]):
            assert option in help_text, (command, option)


def test_targets_that_the_readme_calls_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(
        re.findall(r"^make ([a-z]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
