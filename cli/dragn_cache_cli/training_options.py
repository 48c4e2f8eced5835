"""The options of a training that several commands share, and the settings that they make."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from dragn_cache.training.config import TrainConfig


def train_config(
    recipe: Annotated[
        str | None, typer.Option(help="Published settings, for what is not given; see recipes.")
    ] = None,
    tap: Annotated[str | None, typer.Option(help="Tap to train on. [map or vector]")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training bags. [60]")] = None,
    keep: Annotated[
        Literal["best", "last"] | None,
        typer.Option(help="The epoch that is kept: of lowest validation loss, or the last. [best]"),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after that many epochs without improvement; 0: never. [0]"),
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "adam", "sgd"] | None, typer.Option(help="What takes the steps. [adamw]")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. [0.0003]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay. [0.01]")] = None,
    momentum: Annotated[float | None, typer.Option(help="Momentum of sgd. [0.9]")] = None,
    schedule: Annotated[
        Literal["none", "plateau", "cosine", "step"] | None,
        typer.Option(help="How the learning rate goes on. [none]"),
    ] = None,
    schedule_option: Annotated[
        list[str] | None, typer.Option(help="A schedule's option, name=value; may be repeated.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="auto, bce, weighted_bce, focal, frn, fec, asymmetric or cross_entropy. [auto]"
        ),
    ] = None,
    loss_option: Annotated[
        list[str] | None, typer.Option(help="A loss's option, name=value; may be repeated.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout before the head. [0.5]")] = None,
    pos_weight: Annotated[
        str | None, typer.Option(help="Weight of positive targets: a number, or balanced.")
    ] = None,
    stage_mask: Annotated[
        Literal["train", "predict", "both"] | None,
        typer.Option(help="Where labels that a bag's stage cannot have are masked. [nowhere]"),
    ] = None,
    stage_table: Annotated[
        Path | None, typer.Option(help="CSV of label,stages for --stage-mask.")
    ] = None,
    scale: Annotated[
        Literal["none", "standard"] | None,
        typer.Option(help="Standardise features by training bags. [none]"),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Bags of a step. [16]")] = None,
    order: Annotated[
        Literal["random", "manifest"] | None,
        typer.Option(help="Order of instances in training. [random]"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    memory: Annotated[
        str, typer.Option(help="What features may fill, as 8GB; larger ones are streamed.")
    ] = "auto",
    intervals: Annotated[int, typer.Option(help="Resamples for the intervals; 0: none.")] = 1000,
    decision: Annotated[
        str | None,
        typer.Option(help="What counts as yes: default, half, thresholds or top-K. [default]"),
    ] = None,
) -> TrainConfig:
    """The settings that these options make; what else there is, a command overrides."""
    from dragn_cache.loading.label_masks import read_stage_table
    from dragn_cache.training.recipes import resolve
    from dragn_cache_cli import parsing

    given = {
        "tap": tap,
        "epochs": epochs,
        "keep": keep,
        "patience": patience,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "schedule": schedule,
        "schedule_options": parsing.parse_options(schedule_option or [], "--schedule-option"),
        "loss": loss,
        "loss_options": parsing.parse_options(loss_option or [], "--loss-option"),
        "dropout": dropout,
        "pos_weight": parsing.parse_weight(pos_weight),
        "stage_mask": stage_mask,
        "stages": None if stage_table is None else read_stage_table(stage_table),
        "scale": scale,
        "batch_size": batch_size,
        "order": order,
        "device": device,
        "memory": memory,
        "intervals": intervals,
        "decision": decision,
    }
    return resolve(recipe, given)


def takes_train_config(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an argument ``config`` as one that has the options of `train_config`."""
    shared, own = _parameters(train_config), _parameters(command)
    own.pop("config")

    @functools.wraps(command)
    def run(**given: Any) -> None:
        settings = {name: given.pop(name) for name in shared}
        command(**given, config=train_config(**settings))

    parameters = [*own.values(), *shared.values()]
    # Typer reads both.
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A function's parameters by name, their annotations evaluated."""
    # The settings' class is not imported before a command runs; any class stands for it.
    hints = get_type_hints(function, localns={"TrainConfig": object}, include_extras=True)
    parameters = inspect.signature(function).parameters
    return {name: p.replace(annotation=hints[name]) for name, p in parameters.items()}
