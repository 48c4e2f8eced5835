"""Checks of settings that are not declared yet."""

from __future__ import annotations

from dragn_cache.errors import InputError


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
