"""The cost of an extraction beside its bound, the network alone, and the loop that users write.

    python benchmarks/extract.py --backbone resnet18 --images 1200

Each round measures, one after the other in one process: decoding alone on one core, the network
alone on full batches that are in memory, the whole extraction from JPEG files, and (with --plain)
the plain loop: eager float32, one bag at a time, one HDF5 file a bag. Ratios are taken within a
round; printed are medians over the rounds. The bound is the time of both things on all cores,
t_forward + t_decode / cores an image. Starting (weights, compiling) is reported beside, not in.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the program does, before torch comes

import h5py
import numpy as np
import torch
from PIL import Image

from dragn_cache.backbones import Backbone
from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.extract import extract
from dragn_cache.extraction.forward import Forward, choose_compute
from dragn_cache.extraction.plan import open_backbone
from dragn_cache.images.crops import Geometry, ImageRequest, read_crops
from dragn_cache.machine import find_compiler, usable_cores
from dragn_cache.manifest import Manifest, read_manifest


def draw(folder: Path, images: int, side: int) -> Manifest:
    """Bags of 1 to 9 JPEGs of side × side: 64 different pictures, as photographs compress."""
    rng = np.random.default_rng(0)
    pictures = []
    for k in range(min(images, 64)):
        coarse = rng.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / f"picture{k}.jpg"
        Image.fromarray(noisy).save(path, quality=90)
        pictures.append(path)
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["bag_id", "labels", "image"])
        done = bag = 0
        while done < images:
            for _ in range(min(1 + bag % 9, images - done)):
                image = folder / f"{done:06d}.jpg"
                os.link(pictures[done % len(pictures)], image)
                table.writerow([f"{bag:05d}", "x", image.name])
                done += 1
            bag += 1
    return read_manifest(folder / "table.csv")


def decode_alone(manifest: Manifest, backbone: Backbone, count: int) -> float:
    """Seconds an image, on one core."""
    settings = backbone.preprocessing
    geometry = Geometry(settings.size, settings.resize_shorter, settings.interpolation)
    rows = [row for rows in manifest.instances.values() for row in rows][:count]
    started = time.perf_counter()
    for row in rows:
        path = manifest.image_root / row.image
        read_crops(ImageRequest(row.image, (path,), (0, 1, 2), (None,), geometry))
    return (time.perf_counter() - started) / len(rows)


def forward_alone(forward: Forward, batches: int) -> float:
    """Seconds an image, on full batches that are in memory, results read back."""
    batch = np.random.default_rng(0).integers(
        0, 256, (forward.batch_size, *forward.backbone.input_shape), np.uint8
    )
    forward(batch).arrays()
    started = time.perf_counter()
    pending = [forward(batch) for _ in range(batches)]
    for result in pending:
        result.arrays()
    return (time.perf_counter() - started) / (batches * forward.batch_size)


def plain_loop(manifest: Manifest, backbone: Backbone, out: Path, images: int) -> float:
    """Seconds an image of the loop that users write."""
    out.mkdir()
    height, width = backbone.preprocessing.size
    network = copy.deepcopy(backbone.network).to(memory_format=torch.contiguous_format)
    mean, std = backbone.mean, backbone.std
    done = 0
    started = time.perf_counter()
    for bag in manifest.bags:
        crops = []
        for row in manifest.instances[bag.bag_id]:
            picture = Image.open(manifest.image_root / row.image).convert("RGB")
            crops.append(np.asarray(picture.resize((width, height))))
        values = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous().float() / 255
        with torch.no_grad():
            outputs = network((values.to(mean.device) - mean) / std)
        with h5py.File(out / f"{bag.bag_id}.h5", "w") as file:
            for tap in backbone.taps:
                file[tap.name] = tap.read(outputs[tap.node], backbone.grid).cpu().numpy()
        done += len(crops)
        if done >= images:
            break
    return (time.perf_counter() - started) / done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--side", type=int, default=224, help="of the JPEG files, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--taps", default=None, help="comma-separated; default: map and vector")
    parser.add_argument("--compute", default="compiled", choices=["eager", "compiled"])
    parser.add_argument("--plain", type=int, default=0, help="images of the plain loop; 0: none")
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="extract-benchmark-"))
    (folder / "images").mkdir()
    manifest = draw(folder / "images", args.images, args.side)
    config = ExtractConfig(
        backbone=args.backbone,
        weights="random",
        size=(224, 224),
        taps=tuple(args.taps.split(",")) if args.taps else None,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        compute=args.compute,
        dtype="float16",
    )
    backbone = open_backbone(config)
    precision = "bfloat16" if args.device.startswith("cuda") else "float32"
    forward = Forward(
        backbone,
        compute=args.compute,
        batch_size=args.batch_size,
        dtype=config.dtype,
        precision=precision,
    )
    forward.warm_up()
    rounds = []
    for number in range(args.rounds):
        t_decode = decode_alone(manifest, backbone, 150)
        t_forward = forward_alone(forward, max(2, 256 // args.batch_size))
        report = extract(manifest, config, folder / "store")
        shutil.rmtree(folder / "store")
        whole = (report.total_seconds - report.start_seconds) / args.images
        t_again = forward_alone(forward, max(2, 256 // args.batch_size))
        t_forward = (t_forward + t_again) / 2  # before and after: these machines drift
        bound = t_forward + t_decode / usable_cores()
        row = {
            "decode_ms": 1000 * t_decode,
            "forward_ms": 1000 * t_forward,
            "whole_ms": 1000 * whole,
            "of_bound": bound / whole,
            "of_forward": t_forward / whole,
            "start_s": report.start_seconds,
            "wait_s": report.wait_seconds,
            "network_s": report.forward_seconds,
            "stall_s": report.stall_seconds,
            "write_s": report.write_seconds,
            "total_s": report.total_seconds,
            "limit": report.limit,
        }
        if args.plain:
            plain = plain_loop(manifest, backbone, folder / "plain", args.plain)
            shutil.rmtree(folder / "plain")
            row["plain_ms"], row["of_plain"] = 1000 * plain, plain / whole
        rounds.append(row)
        print(f"round {number + 1}: {json.dumps(row)}", flush=True)
    shutil.rmtree(folder)
    medians = {
        key: statistics.median(row[key] for row in rounds) for key in rounds[0] if key != "limit"
    }
    print(f"\n{platform.machine()}, {usable_cores()} cores, torch {torch.__version__}, {args}")
    print(f"compiler {find_compiler()}, auto would be {choose_compute(backbone, 10**5, 32)}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    for key, value in medians.items():
        print(f"{key:12} {value:8.3f}")


if __name__ == "__main__":
    main()
