"""Checks of settings that are not declared yet."""

from __future__ import annotations

from dragn_cache.errors import InputError


def flag(name: str) -> str:
    """The command line's option for a field of `TrainConfig`."""
    named = {
        "options": "--option",
        "loss_options": "--loss-option",
        "schedule_options": "--schedule-option",
        "stages": "--stage-table",
    }
    return named.get(name, f"--{name.replace('_', '-')}")


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(
            option, expected=" or ".join(allowed), got=repr(value), remedy="choose one of these"
        )


def at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(
            option, expected=f"at least {least}", got=str(value), remedy="give a larger number"
        )


def within(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(option, expected=f"{low} to {high}", got=str(value), remedy="change it")
