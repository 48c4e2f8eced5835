"""Layers of settings: files that are read, later layers before earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from dragn_cache.errors import InputError
from dragn_cache.layers import merge, read_settings
from dragn_cache.options import Settings, setting


class Settled(Settings):
    """A choice with its options, and a number."""

    rate: float = setting(3e-4, help="Rate.")
    name: Literal["adam", "sgd"] = setting("adam", help="Name.")
    options: Mapping[str, Any] = setting({}, help="Options.", options_of="name")


def test_a_file_that_is_no_toml_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    with pytest.raises(InputError, match=r"my\.toml: expected a TOML file, got No such file"):
        read_settings(path)
    path.write_text("rate = \n")
    with pytest.raises(InputError, match=r"my\.toml: expected a TOML file, got Invalid value"):
        read_settings(path)
    path.write_text("[settled]\ncount = 5\n[other]\nx = 1\n")
    assert read_settings(path, "settled") == {"count": 5}
    path.write_text("count = 5\n")
    assert read_settings(path, "settled") == {"count": 5}


def test_layers_join_options_and_drop_those_of_another_choice() -> None:
    low, high = {"name": "sgd", "options": {"a": 1, "b": 2}, "rate": 1}, {"options": {"b": 3}}
    assert merge(Settled, low, high) == {"name": "sgd", "options": {"a": 1, "b": 3}, "rate": 1}
    assert merge(Settled, low, {"name": "sgd"}) == low
    assert merge(Settled, low, {"name": "adam"}) == {"name": "adam", "options": {}, "rate": 1}
    assert merge(Settled, low, {"name": "adam", "options": {"c": 1}})["options"] == {"c": 1}
    assert merge(Settled, {"options": {"a": 1}}, {"name": "adam"})["options"] == {"a": 1}
    assert merge(Settled, {"rate": 1}, {"rate": 2}) == {"rate": 2}
