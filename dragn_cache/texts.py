"""Texts as people see them: what does not show is escaped, and look-alikes are told apart.

Two texts look alike if they are equal after what people and programs change unseen: Unicode
normalisation, invisible characters, kinds of spaces and dashes, letters of another alphabet that
are drawn as Latin ones, case, leading zeros, and the ``.0`` of a number that was once a float.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping

# Cyrillic and Greek letters that are drawn as Latin ones.
_CYRILLIC = dict(zip("АВЕКМНОРСТХаеорсухіЅѕІЈј", "ABEKMHOPCTXaeopcyxiSsIJj", strict=True))
_GREEK = dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABEZHIKMNOPTYXo", strict=True))
_DASHES = dict.fromkeys("‐‑‒–—―−﹣-", "-")
_DRAWN_ALIKE = str.maketrans(_CYRILLIC | _GREEK | _DASHES)
_VARIANTS = range(0xFE00, 0xFE10)  # selectors of a glyph's variant, themselves invisible


def shown(text: str) -> str:
    """A text as one line for a screen: characters that do not show, or steer a terminal, escaped.

    They are the ones that `repr` escapes: control characters and line ends, escape sequences, marks
    of direction, zero-width characters, spaces other than the common one, lone surrogates.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A text of several lines as one, for a screen."""
    return shown(re.sub(r"\s*[\r\n]+\s*", " ", text.strip()))


def _drawn(text: str) -> str:
    """A text by how its characters are drawn."""
    if text.isascii() and text.isprintable():
        return text
    text = unicodedata.normalize("NFKC", text)
    visible = (c for c in text if (c.isprintable() or c.isspace()) and ord(c) not in _VARIANTS)
    return " ".join("".join(visible).translate(_DRAWN_ALIKE).split())


def _without_zeros(text: str) -> str:
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)


def _without_fraction(text: str) -> str:
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", text)


_STYLES: Mapping[str, Callable[[str], str]] = {
    "case": lambda text: unicodedata.normalize("NFKC", text.casefold()),
    "leading zeros": _without_zeros,
    "'.0'": _without_fraction,
}


def look(text: str) -> str:
    """A key that texts have in common if they look alike."""
    text = _drawn(text)
    for change in _STYLES.values():
        text = change(text)
    return text


def difference(first: str, second: str) -> str:
    """Where two texts that look alike differ, in words or code points: ``case``, ``U+200B``."""
    ways = []
    for name in _STYLES:
        x, y = _drawn(first), _drawn(second)
        for other, change in _STYLES.items():
            if other != name:
                x, y = change(x), change(y)
        if x != y:
            ways.append(name)
    for name in ways:
        first, second = _STYLES[name](first), _STYLES[name](second)
    ways += _code_points(first, second)
    return ", ".join(ways)


def _code_points(first: str, second: str) -> list[str]:
    """The characters by which two texts differ."""
    ways = []
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes()
    for kind, a, b, c, d in blocks:
        if kind != "equal":
            sides = (" ".join(f"U+{ord(x):04X}" for x in s) for s in (first[a:b], second[c:d]))
            ways.append(" against ".join(side for side in sides if side))
    return ways


def twin(name: str, known: Iterable[str]) -> str | None:
    """The first of some names that looks like another one, without being it."""
    key = look(name)
    return next((other for other in known if other != name and look(other) == key), None)


def by_look(names: Iterable[str]) -> dict[str, str]:
    """Names by their looks, the first of those that look alike."""
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(look(name), name)
    return found


def look_alikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Names that look like an earlier one of several, each with that one before it."""
    first: dict[str, str] = {}
    distinct = dict.fromkeys(names)
    return [
        (other, name) for name in distinct if (other := first.setdefault(look(name), name)) != name
    ]
