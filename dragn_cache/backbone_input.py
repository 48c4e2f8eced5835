"""How an image becomes a backbone's input, and what a data set may say about that: settings.

They are declared here and nowhere else: `BackboneInput` is part of the settings of an extraction,
of ``[extract]`` in ``dataset.toml``, and checks what a backbone records as its preprocessing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from dragn_cache.errors import InputError, SettingError
from dragn_cache.options import Settings, setting, value_text

Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]
ChannelMode = Literal["rgb", "average", "each"]

DEFAULT_BACKBONE = "resnet50"
MAX_SIDE = 8192  # a network's activations for more would not fit any machine


# --- texts of the command line -----------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    """``HEIGHTxWIDTH`` in pixels, or one number for a square."""
    match = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text)
    if match is None:
        raise SettingError(
            "size", expected="HEIGHTxWIDTH, as 224x224", got=repr(text), remedy="correct it"
        )
    return int(match[1]), int(match[2] or match[1])


def size_text(size: Sequence[int]) -> str:
    """The inverse of `parse_size`."""
    return "x".join(map(str, size))


def parse_three(text: str) -> tuple[float, ...]:
    """One number for all three inputs, or three separated by commas."""
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3):
        raise InputError(
            "numbers",
            expected="one number or three, as 0.5,0.5,0.5",
            got=repr(text),
            remedy="correct it",
        )
    return numbers * 3 if len(numbers) == 1 else numbers


# --- how numbers become 0 to 255 ---------------------------------------------------------------

_FORMS = "full, LOW:HIGH, percentile:LOW:HIGH or channel-percentile:LOW:HIGH"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class Intensity:
    """Which numbers become 0 and 255; ``low`` and ``high`` are percentiles or the file's units.

    `dragn_cache.images.intensity` says what each kind does, and does it.
    """

    kind: Literal["full", "range", "percentile", "channel-percentile"] = "full"
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Intensity:
        """The setting that a text writes down.

        Raises:
            SettingError: it is none of the four forms, or its numbers are no range.
        """
        if text == "full":
            return cls()
        match = re.fullmatch(
            rf"(?:(percentile|channel-percentile):)?({_NUMBER}):({_NUMBER})", str(text)
        )
        if match is None:
            raise SettingError(
                "intensity",
                expected=_FORMS,
                got=repr(text),
                remedy="write 0:4095 or percentile:1:99.8, say",
            )
        low, high = float(match[2]), float(match[3])
        percent = match[1] is not None
        fits = low < high and math.isfinite(255 * (high - low))
        if not fits or (percent and not 0 <= low < high <= 100):
            raise SettingError(
                "intensity",
                expected="LOW below HIGH" + (", both of 0 to 100" if percent else ""),
                got=repr(text),
                remedy="correct the numbers",
            )
        return cls(match[1] or "range", low, high)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The text that `parse` takes; one for each setting."""
        if self.kind == "full":
            return "full"
        numbers = f"{_short(self.low)}:{_short(self.high)}"
        return numbers if self.kind == "range" else f"{self.kind}:{numbers}"


def _short(number: float) -> str:
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)


# --- the settings ------------------------------------------------------------------------------

Side = Annotated[int, Ge(1), Le(MAX_SIDE)]
Fraction = Annotated[float, Ge(0), Le(1)]
Deviation = Annotated[float, Gt(0)]


def _require_names(names: Sequence[str]) -> None:
    if not names or not all(names):
        raise InputError(
            "names", expected="names, none of them empty", got=repr(names), remedy="correct them"
        )


class BackboneInput(Settings):
    """How an image becomes a backbone's input; None leaves a setting to data set and backbone."""

    size: tuple[Side, Side] | None = setting(
        None,
        kind="features",
        help="Height and width of the network's input in pixels.",
        expected=f"[height, width] in pixels, each from 1 to {MAX_SIDE}",
        metavar="HEIGHTxWIDTH",
        shown_default="the weights' own",
        parse=parse_size,
        text=size_text,
    )
    mean: tuple[Fraction, Fraction, Fraction] | None = setting(
        None,
        kind="features",
        help="Subtracted from the inputs, on a scale of 0 to 1: one number, or three.",
        expected="three numbers from 0 to 1",
        metavar="M[,M,M]",
        shown_default="the weights' own",
        parse=parse_three,
        text=value_text,
    )
    std: tuple[Deviation, Deviation, Deviation] | None = setting(
        None,
        kind="features",
        help="What the inputs are then divided by: one number, or three.",
        expected="three numbers above 0, on a scale of 0 to 1",
        metavar="S[,S,S]",
        shown_default="the weights' own",
        parse=parse_three,
        text=value_text,
    )
    interpolation: Interpolation | None = setting(
        None, kind="features", help="How crops are resized.", shown_default="the weights' own"
    )
    channels: ChannelMode | None = setting(
        None,
        kind="features",
        help="Three feed the network; any number, averaged into its first layer; or each alone, "
        "features concatenated.",
        shown_default="rgb",
    )
    rgb: tuple[str, ...] | None = setting(
        None,
        kind="features",
        help="Channels to use, as green,red,blue: one or three, unless channels are averaged or "
        "taken each alone.",
        expected="a list of channels",
        metavar="NAME,…",
        shown_default="red, green and blue, else the first three",
        check=_require_names,
    )
    intensity: str | None = setting(
        None,
        kind="features",
        help=f"Which numbers become black and white: {_FORMS}.",
        expected="a text, as full or percentile:1:99.8",
        shown_default="full",
        check=Intensity.parse,
    )


class BackboneChoice(Settings):
    """Which backbone, and which of its outputs."""

    backbone: str | None = setting(
        None,
        kind="features",
        help="A network's name; see backbones.",
        expected="a name",
        shown_default=DEFAULT_BACKBONE,
    )
    taps: tuple[str, ...] | None = setting(
        None,
        kind="features",
        help="Outputs to store; see taps.",
        expected="a list of names",
        metavar="NAME,…",
        shown_default="the last map and its spatial mean",
        check=_require_names,
    )


class ExtractDefaults(BackboneInput, BackboneChoice):
    """Settings of the section ``[extract]`` of a ``dataset.toml``."""
