"""Names of others on the screen: nothing in them steers a terminal or is taken for markup."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import dragn_cache_cli
import pytest
from command_line import run
from conftest import write_dataset
from dragn_cache_cli import screen

HOSTILE = "\x1b[31mred\x1b]0;title\x07\u202egnp.\u2066\x9b2J\x7f\r\nerror: forged"
ESCAPED = r"\x1b[31mred\x1b]0;title\x07\u202egnp.\u2066\x9b2J\x7f\r\nerror: forged"
MARKUP = "[bold]x[/bold] :smile: [/]"


def test_every_way_to_the_screen_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    screen.say(HOSTILE)
    screen.note(HOSTILE)
    screen.warn(HOSTILE)
    printed = capsys.readouterr()
    assert printed.out == f"{ESCAPED}\n"
    assert printed.err == f"{ESCAPED}\nwarning: {ESCAPED}\n"
    screen.print_table([HOSTILE], [[HOSTILE]], HOSTILE)
    printed = capsys.readouterr()
    assert printed.out.count(ESCAPED) == 3
    assert printed.out.replace("\n", "").isprintable()


def test_nothing_is_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    screen.say(MARKUP)
    screen.print_table([MARKUP], [[MARKUP]], MARKUP)
    assert capsys.readouterr().out.count(MARKUP) == 4


def test_json_on_the_screen_is_the_true_text_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = {HOSTILE: [HOSTILE, "µ", 3]}
    screen.print_json(value)
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert json.loads(printed) == value


def test_names_in_a_data_set_do_not_steer_the_terminal(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", [1, 1])
    with (folder / "instances.csv").open("a", newline="") as table:
        table.write(f'000,"x{HOSTILE}.png",\n"{HOSTILE}",y.png,\n')
    result = run("check", folder)
    assert result.exit_code == 1
    for line in (result.stdout + result.stderr).splitlines():
        assert line.isprintable()
        assert not line.startswith("error: forged")
    assert "missing-file" in result.stdout
    assert ESCAPED in result.stdout


def test_words_of_the_command_line_are_escaped_in_errors_too(tmp_path: Path) -> None:
    for words in (["check", f"--{HOSTILE}"], ["info", tmp_path / "\x1b[2J", "x"], [f"a{HOSTILE}"]):
        result = run(*words)
        assert result.exit_code == 2
        assert result.stderr
        assert all(line.isprintable() for line in result.stderr.splitlines())
    assert r"\x1b[2J" in run("info", tmp_path / "\x1b[2J").stderr


def test_commands_print_by_the_screen_alone() -> None:
    (package,) = dragn_cache_cli.__path__
    for path in (Path(package) / "commands").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "print", path
                assert not called.endswith((".print", ".echo", ".secho")), f"{path}: {called}"
