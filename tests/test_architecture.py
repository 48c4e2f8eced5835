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
    "texts",
    "errors",
    "types",
    "files",
    "checksums",
    "machine",
    "options",
    "layers",
    "named",
    "backbone_input",
    "parallel",
}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "texts": set(),
    "errors": {"texts"},
    "files": {"errors", "types", "machine"},
    "checksums": {"errors", "types", "files"},
    "machine": {"errors", "types"},
    "options": {"errors", "types"},
    "layers": {"errors", "types", "options", "files", "machine"},
    "named": {"errors", "types", "options"},
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
    "datasets": GROUND | {"manifest", "store"},
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
NO_TORCH = GROUND | {"manifest", "images", "scoring", "store", "figures"}
# Of interop only what reads and writes .pt.
TORCH_FILES = {"dragn_cache.interop.tensor_files"}

# module → what importing it in a fresh process must not load
NOT_LOADED = {
    "dragn_cache.store": ("torch", "torchvision", "PIL", "dragn_cache.images"),
    "dragn_cache.interop": ("torch", "torchvision", "PIL", "anndata", "dragn_cache.runs"),
    "dragn_cache.manifest": ("torch", "PIL"),
    "dragn_cache.extraction.workers": ("torch", "h5py", "zarr", "pandas"),
    "dragn_cache.images.augment": ("torch", "h5py", "zarr", "pandas", "dragn_cache.store"),
    "dragn_cache.aggregators": ("torch", "numpy", "h5py"),
    "dragn_cache.aggregators.base": ("torchvision", "PIL", "dragn_cache.backbones", "h5py"),
    "dragn_cache.classical": ("torch", "numpy", "sklearn"),
    "dragn_cache.training.methods": ("torch", "numpy"),
    "dragn_cache.training.losses": ("torch", "numpy"),
    "dragn_cache.training.schedules": ("torch", "numpy"),
    "dragn_cache.training.train": (
        "torchvision",
        "PIL",
        "dragn_cache.backbones",
        "dragn_cache.images",
    ),
    "dragn_cache.training.fit": ("torchvision", "PIL", "dragn_cache.backbones", "sklearn"),
    "dragn_cache.runs.train": ("torchvision", "PIL", "dragn_cache.backbones", "dragn_cache.images"),
    "dragn_cache.runs.explain": (
        "torchvision",
        "PIL",
        "dragn_cache.backbones",
        "dragn_cache.images",
    ),
    "dragn_cache.studies.crossval": (
        "torchvision",
        "PIL",
        "dragn_cache.backbones",
        "dragn_cache.images",
    ),
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


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every text of a file with its line, docstrings too; `{}` for what is put into one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    pieces = {id(piece) for node in joined for piece in node.values}
    for node in joined:
        parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
        yield node.lineno, "".join(map(str, parts))
    for node in ast.walk(tree):
        alone = isinstance(node, ast.Constant) and id(node) not in pieces
        if alone and isinstance(node.value, str):
            yield node.lineno, node.value


def flags_in(text: str) -> list[str]:
    """The options of the command line that a text spells, but for those of a whole command."""
    commands = r"dragn-cache [a-z][^`\n]*(?:\\\n[^`\n]*)*"
    return re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(commands, "", text))


def test_flags_are_found_but_in_whole_commands() -> None:
    assert flags_in("lower --lr, or ``--memory``") == ["--lr", "--memory"]
    assert flags_in("run: dragn-cache verify {} --repair") == []
    assert flags_in("# --- how ---") == []


OTHER_PROGRAMS = {"aggregators/recursion/library.py"}  # asks the compiler for its --version


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_the_library_spells_no_flags(name: str) -> None:
    """A Python caller knows settings by their names; the command line spells them as options."""
    found = [
        f"{path.relative_to(ROOT)}:{line}: {flag}"
        for module, path in modules().items()
        if room(module) == name and str(path.relative_to(LIBRARY)) not in OTHER_PROGRAMS
        for line, text in texts(path)
        for flag in flags_in(text)
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


def drawn_arrows() -> set[tuple[str, str]]:
    text = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    return set(re.findall(r'data-from="(\w+)" data-to="(\w+)"', text))


def test_the_drawing_shows_the_imports() -> None:
    """Every arrow is an import, and every import between packages lies along the arrows."""
    known = modules()
    ground = GROUND | {"devices"}
    found = {
        (room(module), room(name))
        for module, path in known.items()
        for name, _ in imports(path, set(known))
        if name.startswith("dragn_cache.")
    }
    between = {(a, b) for a, b in found if a and a != b and a not in ground and b not in ground}
    arrows = drawn_arrows()
    assert arrows <= between, arrows - between
    reached = arrows
    while longer := {(a, d) for a, b in reached for c, d in arrows if b == c} - reached:
        reached = reached | longer
    assert between <= reached, between - reached


def test_the_architectures_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+\.py): (\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((LIBRARY / file).read_text(encoding="utf-8"))
        names = {getattr(node, "name", "") for node in tree.body}
        targets = (t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets)
        names |= {getattr(target, "id", "") for target in targets}
        names |= {getattr(n.target, "id", "") for n in tree.body if isinstance(n, ast.AnnAssign)}
        assert name in names, (file, name)
    for folder in re.findall(r"`((?:tests|docs|cli|dragn_cache|data_manifests)/[\w/.-]*)`", text):
        assert (ROOT / folder).exists(), folder


@pytest.mark.parametrize("module", list(NOT_LOADED))
def test_a_fresh_import_loads_nothing_it_must_not(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & set(NOT_LOADED[module])


def modules_in_the_readme() -> set[str]:
    """The library's modules as README's tree has them: ``store/plan.py``."""
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("dragn_cache/  ") : readme.index("cli/dragn_cache_cli/")]
    named, folder = set(), ""
    for line in tree.splitlines()[1:]:
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if name.endswith("/"):
            folder = name
        elif indent == 2:
            named.add(name)
        elif indent == 4:
            named.add(folder + name)
    return named


def test_the_readmes_tree_is_the_librarys() -> None:
    files = [*LIBRARY.rglob("*.py"), *LIBRARY.rglob("*.cpp")]
    have = {str(f.relative_to(LIBRARY)) for f in files if f.name != "__init__.py"}
    assert modules_in_the_readme() == have


def test_the_readmes_tree_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("cli/dragn_cache_cli/    ") :]
    for path in CLI.rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"\b{path.stem}\b", tree), path


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
