"""docs/api.md, made from what the packages say of themselves.

Write it anew after a change of a public name: python tests/api_page.py > docs/api.md
"""

from __future__ import annotations

import importlib
import inspect

from dragn_cache.options import Settings, declarations

FACES = (
    "dragn_cache",
    "dragn_cache.manifest",
    "dragn_cache.store",
    "dragn_cache.ragged",
    "dragn_cache.aggregators",
    "dragn_cache.classical",
    "dragn_cache.backbones",
    "dragn_cache.interop",
    "dragn_cache.errors",
)

HEAD = """# The public surface

What is listed here may be relied on: it changes with a line in `CHANGELOG.md`. Everything else,
whatever its name, may change. This page is made by `python tests/api_page.py`, and a test compares
it with the code.
"""


def public_names(module: str) -> list[str]:
    """What a module hands out, sorted; of `errors` all classes."""
    loaded = importlib.import_module(module)
    listed = getattr(loaded, "__all__", None)
    own = [n for n, x in vars(loaded).items() if inspect.isclass(x) and x.__module__ == module]
    return sorted(own if listed is None else listed)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for module in FACES:
        loaded = importlib.import_module(module)
        first = (inspect.getdoc(loaded) or "").split("\n")[0]
        rows = [_row(name, getattr(loaded, name)) for name in public_names(module)]
        parts.append("\n".join([f"## `{module}`", "", first, "", *rows, ""]))
    return "\n".join(parts)


def _row(name: str, value: object) -> str:
    if inspect.isclass(value) or inspect.isfunction(value):
        text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
        return f"- **`{name}{_signature(value)}`**: {text}"
    return f"- **`{name}`**: {_size(value)}"


def _size(value: object) -> str:
    try:
        return f"{len(value)} entries by name"  # type: ignore[arg-type]
    except TypeError:
        return type(value).__name__


def _signature(value: type | object) -> str:
    """Parameters with their defaults; of settings only that they are given by name."""
    if inspect.isclass(value):
        if issubclass(value, BaseException):
            return ""
        if issubclass(value, Settings):
            texts = (f"{d.name}={d.default_text or '…'}" for d in declarations(value).values())
            return f"({', '.join(texts)})"
    pieces, named = [], False
    for parameter in inspect.signature(value).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            pieces.append("*")
            named = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        text = stars.get(parameter.kind, "") + parameter.name
        named |= parameter.kind is parameter.VAR_POSITIONAL
        if parameter.default is not parameter.empty:
            plain = isinstance(parameter.default, str | int | float | bool | tuple | None)
            text += f"={parameter.default!r}" if plain else "=…"
        pieces.append(text)
    return f"({', '.join(pieces)})"


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201 - a script
