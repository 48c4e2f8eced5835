"""``dragn-cache taps``: every tap of a backbone with its shape and its size."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer


def taps(
    name: Annotated[str, typer.Argument(help="A backbone; see dragn-cache backbones.")],
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the input in pixels.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every tap of a backbone: its shape and its bytes per instance in fp16.

    Example: dragn-cache taps resnet18 --size 128x320
    """
    from dragn_cache.backbones import default_preprocessing, describe_taps
    from dragn_cache_cli import parsing, screen

    pixels = parsing.parse_size(size) or default_preprocessing(name).size
    found = describe_taps(name, pixels)
    if as_json:
        screen.print_json([asdict(tap) for tap in found])
        return
    rows = [
        (
            tap.name,
            tap.kind,
            "×".join(map(str, tap.shape)),
            screen.size_text(tap.bytes_fp16),
            "default" if tap.default else "",
        )
        for tap in found
    ]
    title = f"{name} at {pixels[0]}×{pixels[1]}"
    screen.print_table(["tap", "kind", "shape", "fp16 per instance", ""], rows, title)
