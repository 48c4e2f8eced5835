"""Peak memory of an extraction, for a small and a ten times larger data set.

    python benchmarks/memory.py

Each is a process of its own; its workers, which hold one image each, do not count. A small network
on small images, so that 20,000 of them take a minute; what a batch and a part hold is as large as
ever.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from extract import draw

from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.extract import extract


def one(images: int, format: str) -> None:
    """Extract so many images and print what was used."""
    folder = Path(tempfile.mkdtemp(prefix="memory-benchmark-"))
    (folder / "images").mkdir()
    config = ExtractConfig(
        backbone="resnet18",
        weights="random",
        size=(64, 64),
        workers=2,
        compute="eager",
        format=format,  # type: ignore[arg-type]
    )
    report = extract(draw(folder / "images", images, 64), config, folder / "store")
    shutil.rmtree(folder)
    print(
        json.dumps(
            {
                "images": report.instances_done,
                "seconds": round(report.total_seconds),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="one extraction of so many, in this process")
    parser.add_argument("--format", default="hdf5", choices=["hdf5", "zarr"])
    args = parser.parse_args()
    if args.images:
        return one(args.images, args.format)
    for format in ("hdf5", "zarr"):
        peaks = []
        for images in (2_000, 20_000):
            command = [sys.executable, __file__, "--images", str(images), "--format", format]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(format, done.stdout.strip(), flush=True)
            peaks.append(json.loads(done.stdout)["peak_mb"])
        print(f"{format}: 20,000 images need {peaks[1] / peaks[0]:.3f} times the memory of 2,000")
    return None


if __name__ == "__main__":
    main()
