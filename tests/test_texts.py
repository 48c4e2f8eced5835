"""Texts on a screen, and texts that look alike."""

from __future__ import annotations

import unicodedata

import pytest

from dragn_cache.errors import InputError, UnknownNameError
from dragn_cache.texts import difference, look, look_alikes, one_line, shown

ALIKE = [
    ("caf\u00e9", "cafe\u0301", "U+00E9 against U+0065 U+0301"),
    ("actin", "ac\u200btin", "U+200B"),
    ("actin", "actin\ufeff", "U+FEFF"),
    ("Actin", "actin", "case"),
    ("007", "7", "leading zeros"),
    ("P07", "p7", "case, leading zeros"),
    ("1.0", "1", "'.0'"),
    ("\u00b5m", "\u03bcm", "U+00B5 against U+03BC"),
    ("cell", "\u0441ell", "U+0063 against U+0441"),
    ("A 1", "A\u00a01", "U+0020 against U+00A0"),
    ("A-1", "A\u20131", "U+002D against U+2013"),
    ("\ufb01lm", "film", "U+FB01 against U+0066 U+0069"),
]
OTHERS = [("1.01", "1.1"), ("10", "1"), ("actin", "aktin"), ("a1", "a11"), ("1.0", "10"), ("", "0")]


@pytest.mark.parametrize(("first", "second", "way"), ALIKE, ids=[ascii(a[1]) for a in ALIKE])
def test_texts_that_look_alike_are_told_apart(first: str, second: str, way: str) -> None:
    assert look(first) == look(second)
    assert difference(first, second) == way
    assert look_alikes(["x", first, "y", second, first]) == [(first, second)]


@pytest.mark.parametrize(("first", "second"), OTHERS)
def test_other_texts_do_not_look_alike(first: str, second: str) -> None:
    assert look(first) != look(second)


def test_whatever_does_not_show_is_escaped_and_the_rest_stays() -> None:
    hidden = [chr(k) for k in range(0x30000) if unicodedata.category(chr(k))[0] == "C"]
    assert {"\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\u200b", "\n", "\udcff"} <= set(hidden)
    text = shown("".join(hidden))
    assert text.isascii()
    assert text.isprintable()
    assert shown("\x1b[31m\u202e\n") == r"\x1b[31m\u202e\n"
    assert shown("café µm × 中 [red] :smile:") == "café µm × 中 [red] :smile:"


def test_errors_are_one_line_without_control_characters() -> None:
    error = InputError("a\x1b]0;x\x07.csv", expected="b", got="c\n  d\r\ne\u202e", remedy="f")
    assert str(error) == r"a\x1b]0;x\x07.csv: expected b, got c d e\u202e; f"
    assert one_line("a  b\n") == "a  b"


def test_an_unknown_name_is_told_what_it_differs_by() -> None:
    text = str(UnknownNameError("label", "cafe\u0301", ["bar", "caf\u00e9", "cage"]))
    assert "did you mean 'caf\u00e9' (they differ by U+0065 U+0301 against U+00E9)?" in text
    assert "did you mean 'B007' (they differ by leading zeros)?" in str(
        UnknownNameError("bag", "B7", ["B8", "B007"])
    )
