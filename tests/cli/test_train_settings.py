"""Settings of trainings: declared once, and so options, a file's keys, records and errors."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import pytest
import tomli_w
import typer
from command_line import ok, refused, run
from dragn_cache_cli.app import guarded
from dragn_cache_cli.options import takes
from typer.testing import CliRunner

from dragn_cache.options import declarations, setting
from dragn_cache.runs.checkpoint import read_checkpoint
from dragn_cache.runs.train import train_run
from dragn_cache.store import open_store
from dragn_cache.studies.config import CrossvalConfig
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.losses import LOSSES
from dragn_cache.training.recipes import settings_of
from dragn_cache.training.schedules import SCHEDULES

FLAGS = {
    name: f"--{name.replace('_', '-')}"
    for name in declarations(TrainConfig)
    if name not in ("options", "loss_options", "schedule_options", "stages")
}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The settings that train-agg would train with; nothing is trained."""
    configs: list[TrainConfig] = []

    def keep(store: object, config: TrainConfig, out: Path, **others: object) -> dict[str, Any]:
        configs.append(config)
        return {}

    monkeypatch.setattr("dragn_cache.runs.train.train_run", keep)
    return configs


# --- files and layers --------------------------------------------------------------------------


def test_a_runs_settings_train_the_same_run_again(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    path = trained / "config.toml"
    assert (
        TrainConfig.from_table(tomllib.loads(path.read_text())["train"], "x")
        == read_checkpoint(trained).config
    )
    ok("train-agg", "--store", store, "--out", tmp_path / "again", "--config", path)
    for name in ("config.toml", "metrics.json", "predictions.csv", "history.csv", "splits.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes(), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "focal", "loss_options": {"alpha": None, "gamma": 1.5}},
        {"aggregator": "abmil", "options": {"embed": (32, 16)}, "tap": "gap"},
        {"pos_weight": "balanced", "shuffle_seed": 5, "optimizer": "sgd", "momentum": 0.5},
        {"pos_weight": 2, "stage_mask": "both", "stages": {"golgi": ("a", "b"), "none": ("c",)}},
        {"schedule": "step", "schedule_options": {"milestones": (3, 7)}, "memory": "1.5GB"},
    ],
)
def test_a_file_gives_back_what_was_written(
    store: Path, tmp_path: Path, given: list[TrainConfig], changes: dict[str, Any]
) -> None:
    config, path = TrainConfig(**changes), tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(config.to_table()))
    ok("train-agg", "--store", store, "--config", path)
    assert given == [config]


def test_options_come_before_the_file_and_the_file_before_the_recipe(
    store: Path, tmp_path: Path, given: list[TrainConfig]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('lr = 0.25\nbatch_size = 7\n[options]\nshort = "repeated"\n')
    line = ["train-agg", "--store", store, "--recipe", "dragn-fly", "--config", path]
    ok(*line)
    ok(*line, "--lr", "0.125", "--option", "bn=false")
    ok(*line, "--unit", "L2Agg", "--seed", 3)
    ok(*line, "--schedule", "cosine", "--aggregator", "abmil", "--option", "attn_dim=5")
    first, second, third, fourth = given
    # The recipe's batches are of 4, at 1e-4; what nobody gives is the default.
    assert (first.lr, first.batch_size, first.epochs, first.keep) == (0.25, 7, 120, "best")
    assert first.options == {"unit": "L1Agg", "short": "repeated"}
    assert second == first.replace(lr=0.125, options={**first.options, "bn": False})
    assert third == first.replace(seed=3, options={"unit": "L2Agg", "short": "repeated"})
    assert (fourth.options, fourth.schedule_options) == ({"attn_dim": 5}, {})


def test_a_cross_validation_takes_the_settings_of_a_run(
    store: Path, trained: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text((trained / "config.toml").read_text())
    base = ["crossval", "--store", store, "--folds", 3, "--seeds", 1, "--jobs", 1]
    base += ["--aggregator", "dragn,max", "--config", config]
    ok(*base, "--out", tmp_path / "cv", "--intervals", 20, "--batch-size", 5)
    record = tomllib.loads((tmp_path / "cv" / "config.toml").read_text())
    first, second = record["methods"].values()
    # The run's own options are those of its aggregator alone.
    assert (first["options"], second["options"]) == ({"unit": "L1Agg"}, {})
    assert (first["epochs"], first["batch_size"], record["crossval"]["intervals"]) == (2, 5, 20)
    line = refused(*base[:-1], tmp_path / "cv" / "config.toml", "--out", tmp_path / "x")
    assert line.startswith(
        f"error: {tmp_path / 'cv' / 'config.toml'}: expected settings alone, or in a section "
        "[train] as a run's config.toml has it, got [crossval], [data], [methods]; "
    )
    config.write_text('views = "all"\n')
    line = refused(*base, "--out", tmp_path / "x")
    assert line.startswith("error: train.views: expected off, got 'all'")
    assert not (tmp_path / "x").exists()


# --- errors and warnings -----------------------------------------------------------------------

BOUNDS = [
    ("--epochs", "0", "a whole number of at least 1, got 0"),
    ("--batch-size", "0", "a whole number of at least 1, got 0"),
    ("--patience", "-1", "a whole number of at least 0, got -1"),
    ("--intervals", "-1", "a whole number of at least 0, got -1"),
    ("--seed", "-1", "a whole number from 0 to 9223372036854775807, got -1"),
    ("--shuffle-seed", "-1", "a whole number from 0 to 9223372036854775807, got -1"),
    ("--lr", "1001", "a number from 0 to 1000, got 1001.0"),
    ("--weight-decay", "-0.5", "a number from 0 to 1000, got -0.5"),
    ("--momentum", "1", "a number from 0 to 0.999, got 1.0"),
    ("--dropout", "1", "a number from 0 to 0.999, got 1.0"),
    ("--pos-weight", "-1", "a number from 0 to 1000000 or balanced, got -1"),
    ("--memory", "8", "auto or a size with its unit, as 8GB, got '8'"),
    ("--decision", "best", "default, half, thresholds or top-K, as top-2, got 'best'"),
]


# The divisions of a cross-validation have seeds of their own.
OF_COMMANDS = [("train-agg", *bound) for bound in BOUNDS]
OF_COMMANDS += [("crossval", *bound) for bound in BOUNDS if not bound[0].endswith("seed")]


@pytest.mark.parametrize(("command", "option", "text", "words"), OF_COMMANDS)
def test_a_bad_value_is_one_line_that_names_its_option(
    command: str, option: str, text: str, words: str, tmp_path: Path
) -> None:
    arguments = [command, "--store", tmp_path, "--out", tmp_path / "x", option, text]
    if command == "crossval":
        arguments += ["--aggregator", "mean"]
    assert refused(*arguments).startswith(f"error: {option}: expected {words}")


def test_the_bounds_above_are_all_there_are() -> None:
    bounded = {n for n, d in declarations(TrainConfig).items() if d.bounds or d.check}
    assert {FLAGS[name] for name in bounded} == {option for option, _, _ in BOUNDS}


@pytest.mark.parametrize("name", [n for n, d in declarations(TrainConfig).items() if d.choices])
def test_another_word_is_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'{name} = "sideways"\n')
    line = refused("train-agg", "--store", tmp_path, "--config", path)
    assert line.startswith(f"error: {path}: {name}: expected ")
    assert "got 'sideways'" in line
    for choice in declarations(TrainConfig)[name].choices or ():
        assert choice in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--keep last --patience 2", "--patience: expected 0 with --keep last: training that do"),
        ("--momentum 0.5", "--momentum: expected --optimizer sgd, which alone reads it, got adamw"),
        ("--stage-mask both", "--stage-mask: expected --stage-table as well, got none; give both"),
        ("--recipe transmil --keep last", "recipe transmil: patience: expected 0 with --keep last"),
        ("--recipe abmul", "recipe: expected a known recipe, got 'abmul'; did you mean abmil,"),
    ],
)
def test_settings_that_do_not_go_together_name_their_options(
    arguments: str, line: str, tmp_path: Path
) -> None:
    said = refused("train-agg", "--store", tmp_path, *arguments.split())
    assert said.startswith(f"error: {line}")


def test_a_file_with_an_unknown_setting_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nepoch = 3\n")
    line = refused("train-agg", "--store", tmp_path, "--config", path)
    assert line.startswith(f"error: {path}: expected a known setting, got 'epoch'; did you mean ep")


def test_errors_and_warnings_of_a_training_name_options(store: Path, tmp_path: Path) -> None:
    base = ["train-agg", "--store", store, "--out", tmp_path / "r", "--intervals", 0]
    line = refused(*base, "--views", "all")
    assert line.endswith(
        "expected augmented views for --views all, got the clean view only; "
        "extract with augmented views, or train with --views off"
    )
    result = run(*base, "--aggregator", "svm", "--epochs", 7, "--loss-option", "gamma=2")
    assert result.exit_code == 0, result.stderr
    assert "does not read --epochs, --loss-option" in " ".join(result.stderr.split())


def test_a_python_caller_reads_names_not_options(store: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = TrainConfig(aggregator="svm", epochs=7, intervals=0)
    train_run(open_store(store), config, tmp_path / "r", warn=said.append)
    assert any(text.endswith("does not read `epochs`") for text in said)


# --- a setting more ----------------------------------------------------------------------------


def test_a_field_more_is_an_option_a_key_a_record_and_a_bounded_error(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class More(TrainConfig):
        warmup_epochs: int = setting(5, ge=0, le=99, help="Epochs before the first.", sweep=True)

    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")

    @takes(More, section="train", recipes=settings_of)
    def train(config: TrainConfig, out: Annotated[Path, typer.Argument()]) -> None:
        train_run(open_store(store), config, out)

    app.command("train")(guarded(train))
    app.command("other")(lambda: None)

    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})

    text = " ".join(call("--help").output.replace("│", " ").split())
    assert re.search(r"--warmup-epochs <int> Epochs before the first\. \[5\]", text)
    first = call(tmp_path / "a", "--recipe", "abmil", "--epochs", 1, "--warmup-epochs", 7)
    assert first.exit_code == 0, first.output
    written = tmp_path / "a" / "config.toml"
    assert tomllib.loads(written.read_text())["train"]["warmup_epochs"] == 7
    again = call(tmp_path / "b", "--config", written)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "b" / "config.toml").read_bytes() == written.read_bytes()
    monkeypatch.setattr("dragn_cache.runs.checkpoint.TrainConfig", More)
    assert read_checkpoint(tmp_path / "b").config.to_dict()["warmup_epochs"] == 7
    line = call(tmp_path / "c", "--warmup-epochs", 100).stderr.strip()
    wanted = "--warmup-epochs: expected a whole number from 0 to 99, got 100; change it"
    assert line == f"error: {wanted}"
    study = CrossvalConfig(train=More(warmup_epochs=7), aggregators=(("mean", {}),))
    assert study.methods["mean"].to_table()["warmup_epochs"] == 7


def test_the_words_for_losses_and_schedules_are_all_there_are() -> None:
    known = declarations(TrainConfig)
    assert set(re.findall(r"\w+", known["loss"].help)) == {"auto", "or", *LOSSES}
    assert set(known["schedule"].choices or ()) == set(SCHEDULES)


# --- sweeps ------------------------------------------------------------------------------------


def test_a_sweep_may_not_range_over_what_a_study_divides_by() -> None:
    swept = {name for name, declared in declarations(TrainConfig).items() if declared.sweep}
    assert {"lr", "weight_decay", "momentum", "dropout", "batch_size", "epochs"} <= swept
    assert {"optimizer", "schedule", "loss", "pos_weight", "scale", "keep", "options"} <= swept
    assert not swept & {"seed", "shuffle_seed", "device", "memory", "intervals", "decision", "tap"}
