"""Reading a whole store beside np.load of one file with the same bytes, both formats.

    python benchmarks/load.py --folder /tmp/load

Writes, once, stores of 3000 bags of 1 to 15 instances with maps (512, 4, 10) and vectors (512,) in
float16, and each tap as one .npy. Then ``open_store(path).load(tap)`` and ``np.load`` take turns in
one process on a warm page cache: medians of 7, GB/s, and their ratio, beside the rate at which this
machine copies memory. "again" is a second load from an opened store, whose index is known.
"streamed" is an epoch over the maps, all bags shuffled, in batches of 32 within 256 MB, nothing
computed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dragn_cache.loading.feeds import Presentations, Streamed
from dragn_cache.loading.stored import StoredBags
from dragn_cache.manifest import Bag, Instance, Manifest
from dragn_cache.ragged import RaggedBags
from dragn_cache.store import (
    InstanceRecord,
    StoreDescription,
    Tap,
    open_store,
    open_writer,
    plan_parts,
)

TAPS = (Tap("layer4", (512, 4, 10), "float16"), Tap("avgpool", (512,), "float16"))
REPEATS = 7
Array = NDArray[np.float16]


def bag_sizes(bags: int) -> list[int]:
    """Instances of each bag, 1 to 15."""
    sizes: list[int] = np.random.default_rng(0).integers(1, 16, bags).tolist()
    return sizes


def features(rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Maps as after a ReLU, and their means."""
    maps = rng.standard_normal((rows, *TAPS[0].shape), np.float32).clip(0).astype(np.float16)
    return {"layer4": maps, "avgpool": maps.mean((2, 3), np.float32).astype(np.float16)}


def write_store(path: Path, form: str, sizes: Sequence[int]) -> None:
    """A store whose bags carry the labels a or b."""
    provenance = {"features": {"backbone": "none"}, "numerics": {}, "plan": {"bags": len(sizes)}}
    description = StoreDescription(form, TAPS, provenance, ("0",))
    ids = [f"{k:05d}" for k in range(len(sizes))]
    bags = [Bag(bag_id, ("ab"[k % 2],)) for k, bag_id in enumerate(ids)]
    instances = {
        bag_id: tuple(Instance(bag_id, f"images/{bag_id}_{i}.png", i) for i in range(size))
        for bag_id, size in zip(ids, sizes, strict=True)
    }
    manifest = Manifest("load", "multilabel", ("a", "b"), tuple(bags), instances, Path())
    rng = np.random.default_rng(1)
    parts = plan_parts(sizes, description.row_bytes)
    writer = open_writer(path, description, parts, manifest)
    for part in parts:
        rows = [row for k in part.bags for row in instances[ids[k]]]
        records = [InstanceRecord(i.image, (0, 0, 320, 128), i.order, bytes(32)) for i in rows]
        with writer.part(part) as target:
            target.put(list(range(len(rows))), records, features(len(rows), rng), "0")
    writer.finish()


def prepare(folder: Path, bags: int) -> None:
    """Write what is missing; the .npy files hold what the stores do."""
    folder.mkdir(parents=True, exist_ok=True)
    for form in ("hdf5", "zarr"):
        path = folder / f"{form}.features"
        if not path.exists():
            write_store(path, form, bag_sizes(bags))
        for tap in TAPS:
            values, _ = open_store(path).load(tap.name)
            plain = folder / f"{tap.name}.npy"
            if not plain.exists():
                np.save(plain, values)
            if not np.array_equal(values, np.load(plain, mmap_mode="r")):
                raise SystemExit(f"{path} and {plain} hold other features")


def seconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    result = step()
    passed = time.perf_counter() - started
    del result  # outside of the time, on both sides
    return passed


def medians(*steps: Callable[[], object]) -> list[float]:
    """Median seconds of each, taking turns."""
    for step in steps:
        step()
    turns = [[seconds(step) for step in steps] for _ in range(REPEATS)]
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/dragn-cache-load"))
    parser.add_argument("--bags", type=int, default=3000)
    options = parser.parse_args()
    prepare(options.folder, options.bags)
    sizes = bag_sizes(options.bags)
    print(f"{len(sizes)} bags, {sum(sizes)} instances, median of {REPEATS}, warm page cache")
    report_copying(options.folder / "layer4.npy")
    for form in ("hdf5", "zarr"):
        path = options.folder / f"{form}.features"
        (opening,) = medians(lambda path=path: open_store(path))  # type: ignore[misc]
        print(f"{form}: open_store {opening * 1e3:.1f} ms")
        for tap in TAPS:
            report(path, tap)
        report_streaming(path)


def report_streaming(path: Path) -> None:
    """One line: an epoch's batches, resident and streamed."""
    store, tap = open_store(path), TAPS[0]
    values, offsets = (torch.from_numpy(a) for a in store.load(tap.name))
    numbers = torch.arange(len(offsets) - 1)
    stored = StoredBags(store, tap, tuple(store.bag_ids), offsets, 256 * 2**20)
    resident = Presentations(RaggedBags(values, offsets), numbers[None], numbers)
    generator = torch.Generator().manual_seed(0)
    streamed = Streamed(stored, numbers)
    times = medians(
        lambda: deque(resident.epoch(32, generator), 0),
        lambda: deque(streamed.epoch(32, generator), 0),
    )
    gb = values.nbytes / 1e9
    cells = [f"{t * 1e3:7.1f} ms {gb / t:5.2f} GB/s" for t in times]
    print(f"  an epoch's batches: resident {cells[0]}   streamed {cells[1]}")


def report_copying(path: Path) -> None:
    """One line: how fast this machine copies memory."""
    source = np.load(path)
    target = np.empty_like(source)
    fresh, again = medians(source.copy, lambda: np.copyto(target, source))
    gb = source.nbytes / 1e9
    print(f"copying {gb:.2f} GB: {gb / fresh:.2f} GB/s into new, {gb / again:.2f} into used memory")


def report(path: Path, tap: Tap) -> None:
    """One line: load of a tap beside np.load."""
    plain, opened = path.parent / f"{tap.name}.npy", open_store(path)
    times = medians(
        lambda: np.load(plain),
        lambda: open_store(path).load(tap.name),
        lambda: opened.load(tap.name),
    )
    gb = np.load(plain, mmap_mode="r").nbytes / 1e9
    cells = [f"{t * 1e3:7.1f} ms {gb / t:5.2f} GB/s" for t in times]
    print(
        f"  {tap.name:8} np.load {cells[0]}   open and load {cells[1]} ({times[0] / times[1]:.2f})"
        f"   again {cells[2]} ({times[0] / times[2]:.2f})"
    )


if __name__ == "__main__":
    main()
