"""``dragn-cache extract``: images → features, once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from dragn_cache.extraction.report import ExtractReport


def extract(
    dataset: Annotated[str, typer.Option(help="A name, a folder, or a CSV; see check.")],
    out: Annotated[Path, typer.Option(help="The store to make or to go on with.")],
    images: Annotated[Path | None, typer.Option(help="Image root, if not the manifest's.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A name; see backbones. [resnet50]")] = None,
    weights: Annotated[
        str, typer.Option(help="imagenet, a torchvision weights name, random[:SEED], or a file.")
    ] = "imagenet",
    taps: Annotated[
        str | None, typer.Option(help="Outputs to store, comma-separated. [last map and its GAP]")
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the input.")] = None,
    grid: Annotated[int | None, typer.Option(help="Pool maps to GRID×GRID first.")] = None,
    format: Annotated[Literal["hdf5", "zarr"], typer.Option(help="Format of the parts.")] = "hdf5",
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="How features are stored.")
    ] = "float16",
    channels: Annotated[
        Literal["rgb", "average", "each"] | None,
        typer.Option(
            help="Three feed the network; any number, averaged into its first layer; or each alone,"
            " features concatenated. [rgb]"
        ),
    ] = None,
    rgb: Annotated[
        str | None,
        typer.Option(
            help="Channels to use, as green,red,blue: three, unless --channels says else."
        ),
    ] = None,
    intensity: Annotated[
        str | None,
        typer.Option(help="full, LOW:HIGH, percentile:LOW:HIGH or channel-percentile:LOW:HIGH."),
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Mean of the input, one or three.")] = None,
    std: Annotated[str | None, typer.Option(help="Deviation of the input, one or three.")] = None,
    interpolation: Annotated[
        str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.")
    ] = None,
    views: Annotated[int, typer.Option(help="Augmented copies of every instance.")] = 0,
    augment: Annotated[
        str | None,
        typer.Option(help="What makes them differ, as flip,rotate90,crop:0.7,noise:0.02."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the augmentation.")] = 0,
    part_instances: Annotated[
        int, typer.Option(help="At most so many instances a part: what a kill can cost.")
    ] = 4096,
    batch_size: Annotated[int, typer.Option(help="Instances of a forward pass.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Decoding processes. [cores, ≤ 8]")] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; several, as cuda:0,cuda:1, share the work.")
    ] = "cpu",
    compute: Annotated[
        Literal["auto", "eager", "compiled"],
        typer.Option(help="Whether torch.compile speeds up the network. [auto: large jobs]"),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(help="Of the network. [auto: bfloat16 on a GPU, else float32]"),
    ] = "auto",
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="What to do with an input that fails.")
    ] = "stop",
    max_errors: Annotated[
        int | None, typer.Option(help="With skip: stop after all when more inputs fail.")
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Compute what is new or has changed, drop what is gone, keep the rest."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a frozen backbone over every crop of every bag and store its features.

    Killed at any point, the same command goes on; finished, it does nothing. Started several
    times at once, on one machine or on several that see the store, the processes share the work.
    Exit code 0: everything is in the store; 1: done, but inputs were skipped; 2: error.

    Example: dragn-cache extract --dataset hpa --backbone resnet50 --size 224x224 --out hpa.features
    """
    from dragn_cache.extraction.config import ExtractConfig
    from dragn_cache.extraction.extract import extract as run
    from dragn_cache.machine import default_workers
    from dragn_cache.manifest import read_manifest
    from dragn_cache_cli import parsing, screen

    config = ExtractConfig(
        workers=default_workers() if workers is None else workers,
        backbone=backbone,
        weights=weights,
        taps=parsing.parse_names(taps),
        size=parsing.parse_size(size),
        grid=grid,
        channels=channels,
        rgb=parsing.parse_names(rgb),
        intensity=intensity,
        mean=parsing.parse_floats("--mean", mean),
        std=parsing.parse_floats("--std", std),
        interpolation=interpolation,
        format=format,
        dtype=dtype,
        views=views,
        augment=augment,
        seed=seed,
        part_instances=part_instances,
        batch_size=batch_size,
        device=device,
        compute=compute,
        precision=precision,
        on_error=on_error,
        max_errors=max_errors,
    )
    manifest = read_manifest(dataset, images=images)
    with screen.progress_bar("extracting", "images") as progress:
        report = run(manifest, config, out, update=update, progress=progress, say=screen.note)
    if as_json:
        screen.print_json({**asdict(report), "limit": report.limit, "advice": report.advice})
    else:
        _print_report(report, out)
    if report.failures:
        screen.warn(
            f"{len(report.failures)} inputs were not used: see {out / 'failures.csv'}; mend them "
            "and repeat the command with --update"
        )
        raise typer.Exit(1)


def _print_report(report: ExtractReport, out: Path) -> None:
    from dragn_cache_cli import screen

    if report.update is not None:
        found = report.update
        screen.say(
            f"update: {found.kept} bags kept, {len(found.changed)} changed, {len(found.new)} new, "
            f"{len(found.removed)} removed, {len(found.waiting)} still to be written"
        )
    if not report.parts_written:
        screen.say(f"{out}: complete, nothing to compute")
        return
    rate = report.instances_done / max(1e-9, report.total_seconds - report.start_seconds)
    screen.say(
        f"{out}: {report.instances_done} instances of {report.images_decoded} images in "
        f"{report.total_seconds:.1f} s ({rate:.1f}/s after {report.start_seconds:.1f} s of "
        f"starting), {report.compute} on {report.device}, parts {report.parts_written} of "
        f"{report.parts_total}"
    )
    each = 1000 * report.decode_seconds / max(1, report.images_decoded)
    screen.say(
        f"time: network {report.forward_seconds + report.device_seconds:.1f} s, waiting for images "
        f"{report.wait_seconds:.1f} s, for the disk {report.stall_seconds:.1f} s; decoding "
        f"{report.decode_seconds:.1f} s in {report.workers} workers ({each:.1f} ms an image), "
        f"writing {report.write_seconds:.1f} s beside"
    )
    screen.say(f"limit: {report.limit}; {report.advice}")
