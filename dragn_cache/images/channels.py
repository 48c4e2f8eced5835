"""The channels of a data set, and the choice of those that feed the network."""

from __future__ import annotations

from collections.abc import Sequence

from dragn_cache.errors import SettingError, UnknownNameError

COLOURS = ("red", "green", "blue")


def plan_channels(
    image: str, channels: Sequence[str], rgb: Sequence[str] | None, mode: str = "rgb"
) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    """Decide which files or planes of an image feed the backbone's inputs.

    Args:
        image: the manifest's path, with or without ``{channel}``.
        channels: the data set's channels in order; without any, a colour file's three.
        rgb: their names. Mode ``rgb``: one or three; by default red, green, blue if the data set
            has all three, else its first three, or its only one. Else any number, by default all.
        mode: ``rgb``, ``average`` or ``each``; see `BackboneInput`.

    Returns:
        the channel names to put into the path (None when the path has no ``{channel}``), and the
        planes to take from one file (none: it is one channel).
    """
    names = tuple(channels) or COLOURS
    if mode != "rgb":
        chosen = tuple(rgb or names)
        _known(chosen, names)
        if "{channel}" in image:
            return chosen, ()
        return None, () if len(channels) == 1 else tuple(names.index(c) for c in chosen)
    if "{channel}" not in image:
        if rgb is None:
            return None, (0, 1, 2)
        chosen = _three(rgb, names)
        return None, (0, 1, 2) if len(names) == 1 else tuple(names.index(c) for c in chosen)
    default = COLOURS if set(COLOURS) <= set(channels) else tuple(channels[:3])
    return _three(rgb or default, channels), (0, 1, 2)


def _known(chosen: Sequence[str], channels: Sequence[str]) -> None:
    for name in chosen:
        if name not in channels:
            raise UnknownNameError("channel", name, channels)


def _three(rgb: Sequence[str], channels: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(rgb)
    _known(chosen, channels)
    if len(chosen) == 1:
        return chosen * 3
    if len(chosen) != 3:
        raise SettingError(
            "rgb",
            expected="one or three channels",
            got=", ".join(chosen),
            remedy=f"name the channels for the three inputs, among: {', '.join(channels)}; "
            "or give `channels=average` or `channels=each`, for any number",
        )
    return chosen
