"""``dragn-cache doctor``: what this machine has, and what an extraction here would cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def doctor(
    dataset: Annotated[
        str | None, typer.Option(help="Measure what extracting this data set would cost.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image root, if not the manifest's.")] = None,
    out: Annotated[Path, typer.Option(help="Where the store would be.")] = Path(),
    backbone: Annotated[str | None, typer.Option(help="A name; see backbones. [resnet50]")] = None,
    weights: Annotated[
        str, typer.Option(help="As for extract; random ones cost the same and need no download.")
    ] = "random",
    taps: Annotated[str | None, typer.Option(help="Outputs to store, comma-separated.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the input.")] = None,
    grid: Annotated[int | None, typer.Option(help="Pool maps to GRID×GRID first.")] = None,
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="How features are stored.")
    ] = "float16",
    views: Annotated[int, typer.Option(help="Augmented copies of every instance.")] = 0,
    augment: Annotated[str | None, typer.Option(help="What makes them differ.")] = None,
    batch_size: Annotated[int, typer.Option(help="Instances of a forward pass.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Decoding processes. [cores, ≤ 16]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    compute: Annotated[
        Literal["auto", "eager", "compiled"], typer.Option(help="As for extract.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has and, for a data set, what an extraction here would take.

    Decoding and the network are measured for a few seconds on the data set's own images.

    Example: dragn-cache doctor --dataset my_data/ --backbone resnet50 --size 224x224
    """
    from dragn_cache.extraction.config import ExtractConfig
    from dragn_cache.extraction.doctor import examine
    from dragn_cache.extraction.estimate import estimate
    from dragn_cache.machine import default_workers
    from dragn_cache.manifest import read_manifest
    from dragn_cache_cli import parsing, screen

    findings = examine(out)
    record: dict[str, Any] = {"machine": [asdict(finding) for finding in findings]}
    if not as_json:
        rows = [(f.what, f.found, f.remedy) for f in findings]
        screen.print_table(["", "found", "to do"], rows)
    if dataset is not None:
        config = ExtractConfig(
            backbone=backbone,
            weights=weights,
            taps=parsing.parse_names(taps),
            size=parsing.parse_size(size),
            grid=grid,
            dtype=dtype,
            views=views,
            augment=augment,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            device=device,
            compute=compute,
        )
        manifest = read_manifest(dataset, images=images)
        cost = estimate(manifest, config, out, say=screen.note)
        record["cost"] = asdict(cost)
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
            screen.say(f"limit: {cost.limit}; {cost.advice}")
            if cost.unreadable:
                screen.warn(f"{cost.unreadable} images could not be read: run dragn-cache check")
            if cost.bytes > cost.free_bytes:
                screen.warn(
                    f"the disk has {screen.size_text(cost.free_bytes)} free: store less with "
                    "--grid, --taps or --dtype float16, or give another --out"
                )
    if as_json:
        screen.print_json(record)
