"""Settings as options of a command, and as the command line that gives them."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tomli_w
import typer
from annotated_types import Ge
from dragn_cache_cli.app import COMMANDS, app, guarded, load_command
from dragn_cache_cli.options import own_flags, spell, takes, value_of, words
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dragn_cache.errors import InputError, SettingError
from dragn_cache.options import Settings, declarations, setting


def size_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise InputError("size", expected="HxW", got=repr(text), remedy="write 3x5, say")
    return int(match[1]), int(match[2])


class Config(Settings):
    """One setting for every kind of option."""

    rate: float = setting(3e-4, ge=0, le=1, help="Rate.")
    batch_size: int = setting(16, ge=1, help="Bags of a step.")
    name: Literal["adam", "sgd"] = setting("adam", help="Name.")
    side: Literal[1, 2] = setting(1, help="Side.")
    text: str | None = setting(None, help="Text.", shown_default="as it is")
    taps: tuple[str, ...] | None = setting(None, help="Taps.")
    means: tuple[float, float] = setting((0.5, 0.25), help="Means.")
    size: tuple[int, int] | None = setting(
        None, help="Size.", parse=size_of, text=lambda size: f"{size[0]}x{size[1]}", metavar="HxW"
    )
    weight: Annotated[float, Ge(0)] | Literal["balanced"] | None = setting(None, help="Weight.")
    options: Mapping[str, Any] = setting({}, help="Option.", flag="option", options_of="name")
    h5: bool = setting(True, help="Files.")
    hidden: int = setting(1, ge=1, help="Not shown.")

    def require_consistent(self) -> None:
        if self.name == "sgd" and self.batch_size > 64:
            raise SettingError(
                "batch_size",
                expected="at most 64 with `name=sgd`",
                got=str(self.batch_size),
                remedy="leave out `name`, or give `h5=False`",
            )


Run = Callable[..., tuple[int, str, str]]
RECIPES = {"published": {"rate": 0.5, "batch_size": 8, "name": "sgd", "options": {"a": 1, "b": 2}}}


def program(cls: type[Settings], made: list[Any], fail: Exception | None = None) -> typer.Typer:
    """A program of two commands, one of which takes settings."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")

    @takes(cls, leave_out=["hidden"], section="train", recipes=RECIPES.__getitem__)
    def train(
        config: Settings, store: Annotated[Path, typer.Argument()], out: Path | None = None
    ) -> None:
        """Train."""
        made.append((config, store, out))
        if fail is not None:
            raise fail

    app.command("train")(guarded(train))
    app.command("other")(lambda: None)
    return app


def call(*arguments: str, fail: Exception | None = None) -> Config:
    made: list[Any] = []
    result = CliRunner().invoke(program(Config, made, fail), ["train", "s", *arguments])
    assert result.exit_code == 0, result.output
    config: Config = made[0][0]
    return config


def refused(*arguments: str, fail: Exception | None = None) -> str:
    result = CliRunner().invoke(program(Config, [], fail), ["train", "s", *arguments])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def help_of(cls: type[Settings]) -> str:
    """The help of the command, its boxes and line ends taken out."""
    result = CliRunner().invoke(program(cls, []), ["train", "--help"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    return " ".join(result.output.replace("│", " ").split())


# --- options -----------------------------------------------------------------------------------


def test_every_setting_is_an_option_with_its_help_and_default() -> None:
    text = help_of(Config)
    for option, shown in (
        ("--rate", "Rate. [0.0003]"),
        ("--batch-size", "Bags of a step. [16]"),
        ("--name", "Name. [adam]"),
        ("--side 1|2", "Side. [1]"),
        ("--text", "Text. [as it is]"),
        ("--means", "Means. [0.5,0.25]"),
        ("--size HxW", "Size."),
        ("--weight FLOAT|balanced", "Weight."),
        ("--option NAME=VALUE", "Option."),
        ("--h5 --no-h5", "Files. [h5]"),
    ):
        assert re.search(rf"{re.escape(option)} (<\S+> )?{re.escape(shown)}", text), option
    assert "--hidden" not in text


def test_what_is_not_given_is_the_default() -> None:
    assert call() == Config()


def test_texts_become_values() -> None:
    line = (
        "--rate 1 --batch-size 7 --name sgd --side 2 --text 3 --taps a,b --means 1,-0.5 --size 3x5 "
        "--weight 2 --option x=1 --option y=none --no-h5"
    )
    config = call(*line.split())
    assert config == Config(
        rate=1.0,
        batch_size=7,
        name="sgd",
        side=2,
        text="3",
        taps=("a", "b"),
        means=(1.0, -0.5),
        size=(3, 5),
        weight=2.0,
        options={"x": 1, "y": None},
        h5=False,
    )
    assert call("--weight", "balanced").weight == "balanced"
    assert call("--h5").h5 is True


def test_a_bad_option_is_one_line_that_names_the_option() -> None:
    for arguments, line in (
        ("--rate 2", "--rate: expected a number from 0 to 1, got 2.0; change it"),
        ("--batch-size 0", "--batch-size: expected a whole number of at least 1, got 0; change it"),
        ("--side 3", "--side: expected 1 or 2, got '3'; choose one of them"),
        ("--means 1", "--means: expected 2 values, each a number, got (1.0,); change it"),
        ("--means 1,b", "--means: expected 2 values, each a number, got (1.0, 'b'); change it"),
        ("--weight x", "--weight: expected a number of at least 0 or balanced, got 'x'; change it"),
        ("--size 3", "--size: expected HxW, got '3'; write 3x5, say"),
        ("--option x", "--option: expected name=value, got 'x'; write bn=false, say"),
        (
            "--name sgd --batch-size 65",
            "--batch-size: expected at most 64 with --name sgd, got 65; "
            "leave out --name, or give --no-h5",
        ),
    ):
        assert refused(*arguments.split()) == line


def test_an_error_of_a_setting_from_inside_the_command_names_the_option() -> None:
    def error(where: str) -> SettingError:
        return SettingError(where, expected="x", got="y", remedy="see `out` and `hidden`")

    assert refused(fail=error("taps")).startswith("--taps: expected x, got y; see --out and --hidd")
    assert refused(fail=error("out")).startswith("--out: expected x")
    assert refused(fail=error("else")).startswith("else: expected x")
    other = InputError("rate", expected="x", got="`rate`", remedy="mend `nothing`")
    assert refused(fail=other) == "rate: expected x, got `rate`; mend `nothing`"


# --- layers ------------------------------------------------------------------------------------


def test_options_come_before_the_file_the_file_before_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('rate = 0.25\nhidden = 3\n[options]\nb = 3\nc = "none"\n')
    recipe, file = ("--recipe", "published"), ("--config", str(path))
    published = Config(rate=0.5, batch_size=8, name="sgd", options={"a": 1, "b": 2})
    assert call(*recipe) == published
    both = published.replace(rate=0.25, hidden=3, options={"a": 1, "b": 3, "c": None})
    assert call(*recipe, *file) == both
    last = call(*recipe, *file, "--rate", "0.125", "--option", "b=5")
    assert last == both.replace(rate=0.125, options={"a": 1, "b": 5, "c": None})
    # Options of another choice are not taken along.
    assert call(*recipe, "--name", "adam", "--option", "d=1").options == {"d": 1}


def test_what_a_run_records_is_a_file_for_the_next(tmp_path: Path) -> None:
    config = Config(rate=1, options={"k": (1, 2), "n": None}, size=(3, 5), h5=False, hidden=4)
    path = tmp_path / "config.toml"
    section = tomli_w.dumps(config.to_table()).replace("[options]", "[train.options]")
    path.write_text(f'[data]\nname = "x"\n[train]\n{section}')
    assert call("--config", str(path)) == config


def test_an_error_names_the_file_or_the_recipe_that_gave_the_value(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("rate = 2\nbatch_size = 100\n")
    file = ("--config", str(path))
    assert refused(*file).startswith(f"{path}: rate: expected a number from 0 to 1, got 2;")
    assert refused(*file, "--rate", "3").startswith("--rate: expected a number from 0 to 1, got 3")
    line = refused(*file, "--rate", "1", "--name", "sgd")
    assert line.startswith(f"{path}: batch_size: expected at most 64 with --name sgd, got 100;")
    path.write_text("ratte = 2\n")
    line = refused(*file)
    assert line.startswith(f"{path}: expected a known setting, got 'ratte'; did you mean rate")
    line = refused("--config", str(tmp_path / "lost.toml"))
    assert line.startswith(f"{tmp_path / 'lost.toml'}: expected a TOML file, got No such file")


# --- a setting more ----------------------------------------------------------------------------


def test_a_field_more_is_an_option_a_key_a_record_and_a_bounded_error(tmp_path: Path) -> None:
    class More(Config):
        warmup_epochs: int = setting(5, ge=0, le=99, help="Epochs before.", kind="numerics")

    made: list[Any] = []
    app = program(More, made)
    assert re.search(r"--warmup-epochs <int> Epochs before\. \[5\]", help_of(More))
    assert "warmup" not in help_of(Config)
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(More(warmup_epochs=7).to_table()))
    assert tomllib.loads(path.read_text())["warmup_epochs"] == 7
    for arguments, epochs in (([], 5), (["--config", str(path)], 7), (["--warmup-epochs", "9"], 9)):
        assert CliRunner().invoke(app, ["train", "s", *arguments]).exit_code == 0
        config = made[-1][0]
        assert config.warmup_epochs == epochs
        assert config.to_table()["warmup_epochs"] == epochs
    result = CliRunner().invoke(app, ["train", "s", "--warmup-epochs", "100"])
    assert "--warmup-epochs: expected a whole number from 0 to 99, got 100" in result.stderr
    assert words(More, {"warmup_epochs": 7}) == ["--warmup-epochs", "7"]


# --- a command line ----------------------------------------------------------------------------

names = st.text("abcxyz", min_size=1, max_size=4)
configs = st.builds(
    Config,
    rate=st.floats(0, 1),
    batch_size=st.integers(1, 64),
    name=st.sampled_from(["adam", "sgd"]),
    side=st.sampled_from([1, 2]),
    text=st.none() | names,
    taps=st.none() | st.lists(names, min_size=1, max_size=3),
    means=st.tuples(st.floats(-9, 9), st.floats(-9, 9)),
    size=st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
    weight=st.none() | st.just("balanced") | st.floats(0, 9),
    options=st.dictionaries(names, st.none() | st.booleans() | st.integers() | names, max_size=3),
    h5=st.booleans(),
)


@given(configs)
def test_the_words_of_settings_give_them_back(config: Config) -> None:
    values = {n: v for n, v in config.to_dict().items() if n != "hidden"}
    assert call(*words(Config, values)) == config


def test_words_leave_out_what_is_none() -> None:
    values = {"size": (3, 5), "h5": False, "options": {"a": None}, "text": None, "means": (1.0, 2)}
    line = "--size 3x5 --no-h5 --option a=none --means 1.0,2"
    assert words(Config, values) == line.split()


def test_none_is_a_word_where_it_may_be_one_and_none_else() -> None:
    class Words(Settings):
        schedule: Literal["none", "step"] = setting("step", help="A word.")
        weight: Annotated[float, Ge(0)] | Literal["balanced"] | None = setting(None, help="None.")

    known = declarations(Words)
    assert value_of(known["schedule"], "none") == "none"
    assert value_of(known["weight"], "none") is None


def test_settings_in_settings_need_to_be_left_out() -> None:
    class Outer(Settings):
        inner: Config = setting(Config(), help="Inner.")

    with pytest.raises(TypeError, match="inner: settings in settings have no option"):
        takes(Outer)(lambda config: None)


def test_backquoted_settings_are_spelled_as_options() -> None:
    error = InputError(
        "x", expected="`dtype=float32`", got="`dtype`", remedy="`h5=False`, `h5=True` or `other`"
    )
    line = "x: expected --dtype float32, got `dtype`; --no-h5, --h5 or `other`"
    assert str(spell(error, {"dtype": "--dtype", "h5": "--h5"})) == line


# --- the program -------------------------------------------------------------------------------


def loaded_by(*arguments: object) -> set[str]:
    """The modules that a command of a process of its own has loaded when it ends well."""
    code = (
        "import sys; from dragn_cache_cli.app import app\n"
        f"try: app({[str(argument) for argument in arguments]!r})\n"
        "except SystemExit as end: print('modules:', *sys.modules); sys.exit(end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split("modules:")[1].split())


HEAVY = {"torch", "torchvision", "numpy", "pandas", "h5py", "zarr", "PIL", "sklearn", "matplotlib"}


def test_the_programs_help_loads_no_settings() -> None:
    loaded = loaded_by("--help")
    assert not {*HEAVY, "pydantic"} & loaded
    assert not {name for name in loaded if name.startswith("dragn_cache_cli.commands.")}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_commands_help_loads_its_settings_only(name: str) -> None:
    loaded = loaded_by(name, "--help")
    assert not HEAVY & loaded
    assert f"dragn_cache_cli.commands.{COMMANDS[name][0]}" in loaded


def test_looking_at_names_files_and_stores_loads_no_torch(data: Path, store: Path) -> None:
    names = {"torch", "torchvision"}
    for command in ("backbones", "recipes", "aggregators"):
        assert not HEAVY & loaded_by(command)
    for line in (
        ("aggregators", "dragn"),
        ("aggregators", "dragn", "--json"),
        ("recipes", "dragn-fly"),
    ):
        assert not HEAVY & loaded_by(*line)
    assert not HEAVY & loaded_by("backbones", "--json")
    assert not names & loaded_by("check", data)
    assert not names & loaded_by("info", store)
    assert not names & loaded_by("verify", store)
    assert not names & loaded_by("export", store, "--layout", "hdf5", "--out", data.parent / "x.h5")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_commands_own_options_are_named_as_it_has_them(name: str) -> None:
    """Errors of a command's own arguments spell them as its help does."""
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400"}).output
    for flag in own_flags(load_command(name)).values():
        assert re.search(rf"{flag}\b", shown), flag


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_line_in_the_list_of_commands_is_the_first_of_the_commands_help(name: str) -> None:
    _, line = COMMANDS[name]
    assert (load_command(name).__doc__ or "").splitlines()[0] == line
