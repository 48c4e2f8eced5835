"""One bag of 400,000 vectors of 64 under 8 GB of memory: each method trains, or refuses in a line.

    python benchmarks/long_bag.py [--instances 400000] [--limit 8] [--seconds 60] [METHOD …]

Each method is a process of its own that, once it has imported what it needs, may map only so much
more that all of its memory would be the limit (RLIMIT_AS, ``ulimit -v``). It fits the long bag and
a few small ones for an epoch, batch size 1, and predicts all of them. Printed are the seconds of
the epoch (of a classical method, of everything) and the peak of the resident memory, or the line in
which it refuses, without the ways out that it names. A method that has not ended after
``--seconds`` is stopped: then its own estimate of the time and the peak so far are printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dragn_cache.classical import CLASSICAL
from dragn_cache.errors import DragnCacheError
from dragn_cache.ragged import RaggedBags
from dragn_cache.studies.trainings import PRELOAD, PRELOAD_CLASSICAL
from dragn_cache.training.config import TrainConfig
from dragn_cache.training.data import LabelledBags
from dragn_cache.training.fit import fit_method
from dragn_cache.training.methods import method_names

SMALL_BAGS, SMALL = 14, 50
LABELS = 5
WIDTH = 64


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def limit_memory(limit: float) -> None:
    """Let this process map as much more as it could fill until it has ``limit`` bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    mapped, filled = (int(status[name].split()[0]) * 1024 for name in ("VmSize", "VmRSS"))
    most = int(mapped + limit - filled)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def long_and_small_bags(instances: int) -> LabelledBags:
    """One long bag and `SMALL_BAGS` of `SMALL` instances."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0, instances, *[SMALL] * SMALL_BAGS])
    values = torch.randn(int(sizes.sum()), WIDTH, generator=generator)
    targets = (np.arange((1 + SMALL_BAGS) * LABELS).reshape(-1, LABELS) % 3 == 0).astype(np.int8)
    splits = ("train",) * (SMALL_BAGS - 5) + ("validation",) * 4 + ("test",) * 2
    return LabelledBags(RaggedBags(values, sizes.cumsum(0)), targets, splits, "multilabel")


def one(method: str, options: dict[str, object], args: argparse.Namespace) -> None:
    """Fit one method in this process and print what came of it."""
    for name in (*PRELOAD, *PRELOAD_CLASSICAL):
        importlib.import_module(name)
    limit_memory(args.limit * 1e9)
    data = long_and_small_bags(args.instances)
    config = TrainConfig(aggregator=method, options=options)
    if method not in CLASSICAL:
        config = config.replace(batch_size=1, epochs=1)
    started, epochs, said = time.perf_counter(), list[float](), list[str]()

    def report(end: str, text: str) -> None:
        seconds = epochs[0] if epochs else time.perf_counter() - started
        print(json.dumps({"end": end, "seconds": seconds, "peak": peak_gb(), "text": text}))
        sys.stdout.flush()

    def stop() -> None:
        report("stopped", " ".join(said))
        os._exit(0)

    timer = threading.Timer(args.seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        fit_method(
            data,
            config,
            labels=[f"label {k}" for k in range(LABELS)],
            progress=lambda row: epochs.append(time.perf_counter() - started),
            warn=said.append,
        )
    except DragnCacheError as error:
        report("refused:", str(error).partition("; ")[0])
    else:
        report("trained", "")


def cases(names: list[str]) -> list[tuple[str, dict[str, object]]]:
    more: list[tuple[str, dict[str, object]]] = [
        ("dragn", {"cap": 4096}),
        ("dragn", {"unit": "L1Agg", "cap": 4096}),
        ("transmil", {"embed": 64}),
    ]
    every = sorted([*((name, {}) for name in method_names()), *more], key=lambda case: case[0])
    return [case for case in every if not names or case[0] in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--instances", type=int, default=400_000)
    parser.add_argument("--limit", type=float, default=8.0, help="GB")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--one", help="options of the method, as JSON, in this process")
    args = parser.parse_args()
    if args.one is not None:
        return one(args.methods[0], json.loads(args.one), args)
    print("| method | | seconds of an epoch | peak, GB |")
    print("| --- | --- | --- | --- |")
    for method, options in cases(args.methods):
        command = [sys.executable, __file__, method, "--one", json.dumps(options)]
        for name in ("instances", "limit", "seconds"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, capture_output=True, text=True)
        name = " ".join([f"`{method}`", *(f"{k}={v}" for k, v in options.items())])
        if done.returncode != 0 or not done.stdout:
            print(f"| {name} | exit code {done.returncode}: {done.stderr.strip()[-300:]} | | |")
            continue
        row = json.loads(done.stdout.splitlines()[0])
        seconds = f"{row['seconds']:.1f}" if row["end"] != "refused:" else ""
        print(
            f"| {name} | {row['end']} {row['text']} | {seconds} | {row['peak']:.2f} |", flush=True
        )
    return None


if __name__ == "__main__":
    main()
