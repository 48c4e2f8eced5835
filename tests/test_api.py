"""The public surface: what is listed exists, is documented, and is what docs/api.md says."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from api_page import FACES, page, public_names

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", FACES)
def test_every_public_name_exists_and_says_what_it_is(module: str) -> None:
    loaded = importlib.import_module(module)
    names = public_names(module)
    assert names
    for name in names:
        value = getattr(loaded, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def test_the_page_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == page(), "python tests/api_page.py > docs/api.md"


def test_importing_the_library_loads_no_torch() -> None:
    code = "import sys, dragn_cache; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pandas", "h5py", "zarr"} & set(done.stdout.split())


def test_there_is_nothing_public_by_accident() -> None:
    """The library's own face has what its stub names, and the version."""
    import dragn_cache

    own = {name for name in dir(dragn_cache) if not name.startswith("_")}
    assert own == set(dragn_cache.__all__)
