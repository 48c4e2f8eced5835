"""``dragn-cache taps``: every tap of a backbone with its shape and its size."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dragn_cache.backbone_input import BackboneInput
from dragn_cache.options import declarations
from dragn_cache_cli.options import takes


@takes(BackboneInput, leave_out=[name for name in declarations(BackboneInput) if name != "size"])
def taps(
    config: BackboneInput,
    name: Annotated[str, typer.Argument(help="A backbone; see dragn-cache backbones.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every tap of a backbone: its shape and its bytes per instance in fp16.

    Example: dragn-cache taps resnet18 --size 128x320
    """
    from dragn_cache.backbones import default_preprocessing, describe_taps
    from dragn_cache_cli import screen

    pixels = config.size or default_preprocessing(name).size
    infos = describe_taps(name, pixels)
    if as_json:
        screen.print_json([asdict(tap) for tap in infos])
        return
    rows = [
        (
            tap.name,
            tap.kind,
            "×".join(map(str, tap.shape)),
            screen.size_text(tap.bytes_fp16),
            "default" if tap.default else "",
        )
        for tap in infos
    ]
    title = f"{name} at {pixels[0]}×{pixels[1]}"
    screen.print_table(["tap", "kind", "shape", "fp16 per instance", ""], rows, title)
