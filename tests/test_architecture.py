"""The shape of the code: which imports are forbidden, and what the documents name."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "dragn_cache"
CLI = ROOT / "cli" / "dragn_cache_cli"

# Every package and lone module of the library, and what of the library it may import besides
# itself. docs/architecture.md says why.
GROUND = {
    "errors",
    "types",
    "files",
    "machine",
    "options",
    "old_options",
    "backbone_input",
    "parallel",
}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "files": {"errors", "types"},
    "machine": {"errors", "types"},
    "options": {"errors", "types"},
    "old_options": {"errors", "types"},
    "backbone_input": {"errors", "types", "options"},
    "parallel": {"errors", "types"},
    "devices": {"errors", "types", "machine"},
    "manifest": GROUND,
    "images": GROUND,
    "scoring": GROUND,
    "ragged": GROUND | {"devices"},
    "store": GROUND | {"manifest"},
    "interop": GROUND | {"manifest", "store"},
    "figures": {"types", "scoring"},
    "aggregators": GROUND | {"devices", "ragged"},
    "classical": GROUND | {"devices", "ragged", "loading", "scoring"},
    "backbones": GROUND | {"devices"},
    "datasets": GROUND | {"manifest"},
    "extraction": GROUND | {"devices", "manifest", "images", "backbones", "store"},
    "loading": GROUND | {"devices", "manifest", "ragged", "store", "scoring"},
    "training": GROUND
    | {"devices", "ragged", "store", "aggregators", "classical", "loading", "scoring"},
    "runs": GROUND
    | {"devices", "ragged", "manifest", "store", "aggregators", "classical", "loading"}
    | {"scoring", "training", "figures"},
    "studies": GROUND
    | {"devices", "ragged", "manifest", "store", "classical", "loading"}
    | {"scoring", "training", "figures"},
    "demo": GROUND | {"datasets", "extraction", "figures", "manifest", "runs", "store", "training"},
}
NO_TORCH = {
    *("types", "errors", "files", "machine", "options", "backbone_input", "parallel"),
    *("manifest", "images", "scoring", "store", "figures"),
}
# Of interop only what reads and writes .pt.
TORCH_FILES = {"dragn_cache.interop.tensor_files"}

# module → what importing it in a fresh process must not load
NOT_LOADED = {
    "dragn_cache.store": ("torch", "torchvision", "PIL", "dragn_cache.images"),
    "dragn_cache.interop": ("torch", "torchvision", "PIL", "anndata", "dragn_cache.runs"),
    "dragn_cache.manifest": ("torch", "PIL"),
    "dragn_cache.extraction.workers": ("torch", "h5py", "zarr", "pandas"),
    "dragn_cache.images.augment": ("torch", "h5py", "zarr", "pandas", "dragn_cache.store"),
    "dragn_cache.aggregators": ("torchvision", "PIL", "dragn_cache.backbones", "h5py"),
    "dragn_cache.training.train": ("torchvision", "PIL", "dragn_cache.backbones"),
    "dragn_cache.training.fit": ("torchvision", "PIL", "dragn_cache.backbones", "sklearn"),
    "dragn_cache.runs.train": ("torchvision", "PIL", "dragn_cache.backbones"),
    "dragn_cache.runs.explain": ("torchvision", "PIL", "dragn_cache.backbones"),
    "dragn_cache.studies.crossval": ("torchvision", "PIL", "dragn_cache.backbones"),
    "dragn_cache.backbones": ("torch", "torchvision", "h5py"),
    "dragn_cache.backbones.families": ("torch", "torchvision", "h5py"),
    "dragn_cache.backbones.backbone": ("h5py", "zarr", "dragn_cache.manifest"),
    "dragn_cache.extraction.config": ("torch", "numpy", "h5py", "zarr", "PIL"),
    "dragn_cache.extraction.check": ("torch", "h5py", "zarr"),
    "dragn_cache.interop.importing": ("torch", "torchvision", "PIL", "anndata"),
    "dragn_cache.store.reader": ("torch", "torchvision", "PIL", "dragn_cache.images"),
    "dragn_cache_cli.app": ("torch", "h5py", "zarr", "PIL", "matplotlib", "sklearn"),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(LIBRARY.rglob("*.py"))}


def imports(path: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """Every module that a file names in an import statement, wherever it stands, with the line.

    A face, an ``__init__.py`` that resolves its names when they are asked for, has its imports in
    the stub beside it: relative ones, as `lazy_loader` wants them.
    """
    if path.suffix == ".py" and path.with_suffix(".pyi").exists():
        yield from imports(path.with_suffix(".pyi"), known)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == (path.suffix == ".pyi"), f"{path}:{node.lineno}: level"
            base = node.module or ""
            if node.level:
                base = f"{name_of(path)}.{base}"
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in known else base), node.lineno


def room(module: str) -> str:
    """The package or lone module of the library that a module is in; "" for the library itself."""
    return [*module.split("."), ""][1]


def forbidden(module: str, name: str) -> bool:
    """Whether a module of the library must not import another module, of the library or not."""
    own, top = room(module), name.split(".")[0]
    if top in ("torch", "torchvision"):
        return own in NO_TORCH or (own == "interop" and module not in TORCH_FILES)
    if top != "dragn_cache" or room(name) in ("", own):
        return top == "dragn_cache_cli"
    return room(name) not in ALLOWED[own]


def test_every_import_is_allowed() -> None:
    known = modules()
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in known.items()
        if room(module)
        for name, line in imports(path, set(known))
        if forbidden(module, name)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("stub", sorted(LIBRARY.rglob("*.pyi")), ids=name_of)
def test_a_face_gives_every_name_of_its_stub(stub: Path) -> None:
    module = importlib.import_module(name_of(stub))
    (listed,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.Assign)
    )
    assert sorted(module.__all__) == sorted(listed)
    for name in listed:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


def test_every_room_that_has_rules_exists() -> None:
    assert {room(module) for module in modules()} - {""} == set(ALLOWED)


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    graph = {
        module: {name for name, _ in imports(path, set(known)) if name in known} - {module}
        for module, path in known.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


# Who can be called from Python and from the command line names settings, in backquotes; the command
# line writes the options.
WITHOUT_OPTIONS = {
    *("types", "errors", "files", "machine", "options", "backbone_input", "parallel", "devices"),
    *("manifest", "images", "backbones", "extraction", "store", "interop", "datasets", "runs"),
    *("figures", "demo", "ragged"),
}
# Still to be reworded.
OPTIONS_LEFT = {"dragn_cache.extraction.engine", "dragn_cache.extraction.workers"}


def test_the_library_spells_no_options() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
        for module, path in modules().items()
        if room(module) in WITHOUT_OPTIONS and module not in OPTIONS_LEFT
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(?<![\w-])--[a-z]", node.value)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", list(NOT_LOADED))
def test_a_fresh_import_loads_nothing_it_must_not(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & set(NOT_LOADED[module])


def test_the_readmes_tree_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The tree") :]
    for path in [*sorted(LIBRARY.rglob("*.py")), *sorted(CLI.rglob("*.py"))]:
        if path.name != "__init__.py":
            assert re.search(rf"\b{re.escape(path.stem)}\b", tree), path


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
