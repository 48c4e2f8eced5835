"""``dragn-cache doctor``: what this machine has, and what an extraction here would cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dragn_cache.extraction.config import EstimateConfig
from dragn_cache_cli.options import own_flags, spell_text, takes


@takes(EstimateConfig, leave_out=["format", "on_error", "max_errors"], section="extract")
def doctor(
    config: EstimateConfig,
    dataset: Annotated[
        str | None, typer.Option(help="Measure what extracting this data set would cost.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image root, if not the manifest's.")] = None,
    out: Annotated[Path, typer.Option(help="Where the store would be.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has and, for a data set, what an extraction here would take.

    Decoding and the network are measured for a few seconds on the data set's own images.

    Example: dragn-cache doctor --dataset my_data/ --backbone resnet50 --size 224x224
    """
    from dragn_cache.extraction.doctor import examine
    from dragn_cache.extraction.estimate import estimate
    from dragn_cache.manifest import read_manifest
    from dragn_cache_cli import screen

    findings = examine(out)
    record: dict[str, Any] = {"machine": [asdict(finding) for finding in findings]}
    if not as_json:
        rows = [(f.what, f.found, f.remedy) for f in findings]
        screen.print_table(["", "found", "to do"], rows)
    if dataset is not None:
        manifest = read_manifest(dataset, images=images)
        cost = estimate(manifest, config, out, say=screen.note)
        advice = spell_text(cost.advice, own_flags(doctor))
        record["cost"] = {**asdict(cost), "advice": advice}
        if not as_json:
            screen.say(
                f"{manifest.name}: {cost.instances} instances of {cost.images} images, "
                f"{screen.size_text(cost.bytes)} of features"
            )
            screen.say(
                f"measured: decoding {cost.decode_ms:.1f} ms an image on one core, network "
                f"{cost.forward_ms:.1f} ms an instance ({cost.compute} on {cost.device})"
            )
            screen.say(
                f"expected: {cost.rate:.1f} instances/s, {screen.time_text(cost.seconds)} "
                f"({cost.start_s:.0f} s of starting)"
            )
            screen.say(f"limit: {cost.limit}; {advice}")
            if cost.unreadable:
                screen.warn(f"{cost.unreadable} images could not be read: run dragn-cache check")
            if cost.bytes > cost.free_bytes:
                screen.warn(
                    f"the disk has {screen.size_text(cost.free_bytes)} free: store less with "
                    "--grid, --taps or --dtype float16, or give another --out"
                )
    if as_json:
        screen.print_json(record)
