"""``dragn-cache extract``: images → features, once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from dragn_cache.extract import ExtractReport


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
    part_instances: Annotated[
        int, typer.Option(help="At most so many instances a part: what a kill can cost.")
    ] = 4096,
    batch_size: Annotated[int, typer.Option(help="Instances of a forward pass.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Decoding processes. [cores, ≤ 8]")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="What to do with an input that fails.")
    ] = "stop",
) -> None:
    """Run a frozen backbone over every crop of every bag and store its features.

    Killed at any point, the same command goes on; finished, it does nothing.
    Exit code 0: everything is in the store; 1: done, but inputs were skipped; 2: error.

    Example: dragn-cache extract --dataset hpa --backbone resnet50 --size 224x224 --out hpa.features
    """
    from dragn_cache.config import ExtractConfig
    from dragn_cache.extract import extract as run
    from dragn_cache.manifest import read_manifest
    from dragn_cache_cli import parsing, screen

    config = ExtractConfig(
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
        part_instances=part_instances,
        batch_size=batch_size,
        device=device,
        on_error=on_error,
        **({} if workers is None else {"workers": workers}),
    )
    manifest = read_manifest(dataset, images=images)
    with screen.progress_bar("extracting", "images") as progress:
        report = run(manifest, config, out, progress=progress)
    _print_report(report, out)
    if report.failures:
        screen.warn(
            f"{len(report.failures)} inputs were not used: see {out / 'failures.csv'}; to try them "
            "again, mend them, remove their bags' parts (manifest/bags.csv says which), and repeat"
        )
        raise typer.Exit(1)


def _print_report(report: ExtractReport, out: Path) -> None:
    from dragn_cache_cli import screen

    if not report.parts_written:
        screen.out.print(f"{out}: complete already, nothing to do", markup=False, soft_wrap=True)
        return
    rate = report.instances_done / report.total_seconds
    screen.out.print(
        f"{out}: {report.instances_done} instances of {report.images_decoded} images in "
        f"{report.total_seconds:.1f} s ({rate:.1f}/s), parts {report.parts_written} "
        f"of {report.parts_total}",
        markup=False,
        soft_wrap=True,
    )
    screen.out.print(
        f"time: forward {report.forward_seconds:.1f} s, waiting for images "
        f"{report.wait_seconds:.1f} s, writing {report.write_seconds:.1f} s, starting "
        f"{report.start_seconds:.1f} s; decoding took {report.decode_seconds:.1f} s in the workers",
        soft_wrap=True,
    )
