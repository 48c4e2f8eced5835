"""Recipes: every one can be trained, what is given counts more, options follow their choice."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dragn_cache.aggregators import AGGREGATORS, aggregator_class
from dragn_cache.errors import UnknownNameError
from dragn_cache.options import merge
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.losses import create_loss
from dragn_cache.training.model import build_model
from dragn_cache.training.recipes import RECIPES, settings_of
from dragn_cache.training.schedules import create_schedule


def resolve(recipe: str, given: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**merge(TrainConfig, settings_of(recipe), given))


every_recipe = pytest.mark.parametrize("name", list(RECIPES))


@every_recipe
def test_each_recipe_can_be_trained(name: str) -> None:
    config = resolve(name, {})
    create_loss(config.loss, "multilabel", config.loss_options)
    create_schedule(config.schedule, config.schedule_options)
    if config.aggregator in AGGREGATORS:
        model = build_model(config, (17, 2, 3), 3)
        assert isinstance(model.aggregator, aggregator_class(config.aggregator))


@every_recipe
def test_each_value_has_a_source_and_arrives(name: str) -> None:
    config = resolve(name, {})
    for key, setting in RECIPES[name].items():
        assert setting.source
        field, _, option = key.partition(".")
        found = getattr(config, field)
        assert (found[option] if option else found) == setting.value


def test_values_of_the_papers() -> None:
    fly = resolve("dragn-fly", {})
    assert (fly.lr, fly.batch_size, fly.optimizer) == (1e-4, 4, "adam")
    assert fly.options == {"unit": "L1Agg"}
    assert fly.schedule_options == {"monitor": "f1_macro", "factor": 0.1, "patience": 10}
    frn = resolve("frn", {})
    assert (frn.lr, frn.batch_size, frn.epochs) == (1e-2, 256, 60)
    assert frn.schedule_options == {"min_lr": 1e-8, "epochs": 60}
    assert frn.decision == "thresholds"


def test_what_is_given_counts_more_than_the_recipe() -> None:
    given = {"lr": 0.5, "epochs": 7, "dropout": 0.0, "options": {"bn": False}}
    config = resolve("dragn-fly", given)
    assert (config.lr, config.epochs, config.batch_size) == (0.5, 7, 4)
    assert config.options == {"unit": "L1Agg", "bn": False}
    other = merge(TrainConfig, config.to_dict(), {"options": {"unit": "L2Agg"}})
    assert other["options"] == {"unit": "L2Agg", "bn": False}


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"aggregator": "mean"}, "options", {}),
        ({"aggregator": "abmil", "options": {"attn_dim": 7}}, "options", {"attn_dim": 7}),
        ({"aggregator": "dragn"}, "options", {"unit": "L1Agg"}),
        ({"schedule": "none"}, "schedule_options", {}),
        ({"schedule": "cosine", "schedule_options": {"min_lr": 0.1}}, "schedule_options", None),
    ],
)
def test_options_go_with_their_choice(given: dict[str, Any], field: str, expected: object) -> None:
    found = getattr(resolve("dragn-fly", given), field)
    assert found == (given.get(field) if expected is None else expected)


def test_a_loss_of_its_own_leaves_the_recipes_options() -> None:
    assert resolve("frn", {"loss": "bce"}).loss_options == {}
    assert resolve("frn", {"loss_options": {"anneal": 3}}).loss_options == {
        "gamma": 2.0,
        "anneal": 3,
    }


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean dragn-fly"):
        settings_of("dragn-flies")


def test_the_help_states_the_defaults() -> None:
    """Options of train-agg without a value show in brackets what they are then."""
    from dragn_cache_cli.app import app
    from typer.testing import CliRunner

    text = CliRunner().invoke(app, ["train-agg", "--help"], env={"COLUMNS": "400"}).output
    for name in (
        "epochs", "patience", "optimizer", "lr", "weight_decay", "momentum", "schedule", "loss",
        "dropout", "scale", "batch_size", "order", "decision",
    ):  # fmt: skip
        line = re.search(rf"--{name.replace('_', '-')} .*\[(\S+)\]", text)
        assert line is not None, name
        assert line[1] == str(getattr(TrainConfig(), name)), name
