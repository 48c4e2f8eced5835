"""Evidence that a change of the code changes nothing that is computed.

    git worktree add ../before COMMIT
    PYTHONPATH=../before:../before/cli python benchmarks/unchanged.py make OUT-BEFORE
    PYTHONPATH=.:cli python benchmarks/unchanged.py make OUT-AFTER
    python benchmarks/unchanged.py compare OUT-BEFORE OUT-AFTER

``make`` runs the program of the code that PYTHONPATH leads to: stores in both formats, with maps,
vectors and views; runs, a cross-validation, evaluations, predictions, explanations; exports, and
imports of these. It knows the command line only, so the code may be arranged in any way.

``compare`` compares every file: parts, tables and all that has no other rule byte by byte, PNG
pictures pixel by pixel, checkpoints tensor by tensor, JSON and TOML by value. `LEFT_OUT` names what
differs between two runs of the same code. Exit code 0: nothing differs; 1: what is listed does.
With ``--tolerance``, numbers of results may differ by `BOUNDS`, and every file is listed with the
rule that it keeps: ``equal`` or ``tolerance``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image

PROGRAM = "from dragn_cache_cli.app import main; main()"
SMALL = "--size 64x64 --workers 2 --part-instances 64 --batch-size 16"
RESNET = f"--backbone resnet18 --weights random --dtype float32 --compute eager {SMALL}"
SHORT = "--epochs 4 --intervals 50"

STEPS = (
    "simulate --out simulated --bags 60 --seed 5 --size 64x64",
    "simulate --out others --bags 24 --seed 6 --size 64x64",
    "check simulated",
    # Stores: both formats, maps and vectors, views, a pooled map, compiled.
    f"extract --dataset simulated --out maps.features {RESNET}",
    f"extract --dataset others --out others.features {RESNET}",
    f"extract --dataset simulated --out zarr.features --format zarr {RESNET}",
    f"extract --dataset simulated --out views.features --backbone mobilenet_v3_small "
    f"--weights random:7 --views 2 --augment flip,rotate90,crop:0.7,noise:0.02 --seed 3 "
    f"--compute eager {SMALL}",
    f"extract --dataset simulated --out grid.features --format zarr --backbone squeezenet1_1 "
    f"--weights random:1 --grid 1 --channels each --compute compiled {SMALL}",
    *(f"verify {name}.features" for name in ("maps", "others", "zarr", "views", "grid")),
    # Runs.
    *(
        f"train-agg --store maps.features --out runs/{unit} --unit {unit} {SHORT}"
        for unit in ("L1Agg", "L2Agg", "L3Agg")
    ),
    f"train-agg --store zarr.features --out runs/abmil --aggregator abmil --seed 1 {SHORT}",
    "train-agg --store zarr.features --out runs/svm --aggregator svm --intervals 50",
    f"train-agg --store zarr.features --out runs/options --aggregator abmil --option embed=32,16 "
    f"--option attn_dim=16 --loss focal --loss-option gamma=1.5 --schedule cosine --optimizer sgd "
    f"--lr 0.01 --decision thresholds --patience 3 {SHORT}",
    f"train-agg --store maps.features --out runs/recipe --recipe dragn-fly {SHORT}",
    f"train-agg --store views.features --out runs/views --aggregator dragn --scale standard "
    f"--views random --shuffle-seed 4 {SHORT}",
    f"train-agg --store maps.features --out runs/streamed --aggregator mean --tap layer4 "
    f"--memory 300KB {SHORT}",
    f"crossval --store maps.features --out crossval --aggregator abmil,hamil[unit=L1Agg] "
    f"--aggregator vlad[words=4] --folds 3 --seeds 2 --jobs 2 {SHORT}",
    # Runs put to use.
    "evaluate runs/L3Agg --out evaluated/own --decision thresholds",
    "evaluate runs/abmil --out evaluated/others --store others.features",
    *(
        f"predict runs/{name} --store others.features --out predicted/{name}"
        for name in ("L1Agg", "L2Agg", "L3Agg", "abmil", "svm", "options", "recipe", "streamed")
    ),
    "explain runs/options --store maps.features --out explained/attention --method attention",
    "explain runs/L3Agg --store maps.features --out explained/cosine --method cosine --split test",
    "explain runs/L2Agg --store others.features --out explained/left-out --method leave-one-out "
    "--no-h5",
    # Other tools' files.
    "export maps.features --layout clam --out clam",
    "export zarr.features --layout hdf5 --out whole.h5",
    "import clam --bags simulated/bags.csv --encoder resnet18 --out again/clam.features "
    "--format zarr",
    "import whole.h5 --out again/whole.features",
)

# What differs between two runs of the same code, by file and name, and why.
LEFT_OUT = (
    ("*/folds.csv", "seconds", "a clock's reading"),
    ("*/summary.csv", "seconds_mean", "a clock's reading"),
    ("*/trainings/*.json", "seconds", "a clock's reading"),
)

# How far numbers may be apart with --tolerance, by file; the first pattern that fits holds. Files
# that none fits, parts and settings say, have no tolerance.
BOUNDS = (
    ("*.features/*", None),
    ("*/predictions.csv", 1e-4),
    ("*/trainings/*.json", 1e-4),
    ("explained/*", 1e-4),
    ("*/checkpoint.pt", 1e-4),
    ("*/metrics.json", 1e-6),
    ("*/history.csv", 1e-6),
    ("*/selection.csv", 1e-6),
    ("*/summary.csv", 1e-6),
    ("*/folds.csv", 1e-6),
    ("*/comparison.csv", 1e-6),
    ("evaluated/*.csv", 1e-6),
    ("*.png", 0.5),  # of 255, in the mean: pictures are drawn from the numbers above
)


# --- make --------------------------------------------------------------------------------------


def make(out: Path) -> None:
    """Run every step in a new folder; relative paths, so that no record depends on its place."""
    out.mkdir(parents=True)
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")}
    # A library that chooses its threads by the load would choose the order of sums.
    environment |= {"OMP_DYNAMIC": "FALSE", "MKL_DYNAMIC": "FALSE", "NO_COLOR": "1"}
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(Path(folder).resolve()) for folder in folders if folder]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    run = partial(subprocess.run, cwd=out, env=environment, capture_output=True, text=True)
    where = "import dragn_cache, dragn_cache_cli as cli; print(dragn_cache.__file__, cli.__file__)"
    print("code:", run([sys.executable, "-c", where]).stdout.strip())
    begun = time.perf_counter()
    for step in STEPS:
        started = time.perf_counter()
        done = run([sys.executable, "-c", PROGRAM, *shlex.split(step)])
        print(f"{time.perf_counter() - started:6.1f} s  {step}", flush=True)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}: {done.stderr or done.stdout}")
        if step.startswith("simulate --out others"):
            _rename_bags(out / "others")
    print(f"{time.perf_counter() - begun:6.1f} s  in all, {len(STEPS)} steps")


def _rename_bags(folder: Path) -> None:
    """Give a simulated set ids and groups of its own, so that no run has seen any of them."""
    for name in ("bags.csv", "instances.csv"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("\nSIM", "\nNEW").replace("PLATE", "SLIDE"))


# --- compare -----------------------------------------------------------------------------------

Differences = Iterator[str]


@dataclass(frozen=True)
class Rule:
    """How two files are compared.

    Attributes:
        left_out: names of columns or entries that are not compared.
        bound: how far numbers may be apart; None: not at all.
    """

    left_out: frozenset[str]
    bound: float | None = None


def compare(before: Path, after: Path, *, tolerance: bool) -> int:
    """Print what differs between two folders of `make`, and a count; the number of differences."""
    counts = {"equal": 0, "tolerance": 0, "different": 0}
    for name in sorted(_files(before) | _files(after)):
        verdict, found = _compare_file(before / name, after / name, name, tolerance)
        counts[verdict] += 1
        if tolerance and not found:
            print(f"{verdict:9}  {name}")
        for text in found[:5]:
            print(f"DIFFERENT  {name}: {text}")
        if len(found) > 5:
            print(f"DIFFERENT  {name}: and {len(found) - 5} more")
    held = f"{counts['equal']} files equal"
    if tolerance:
        held += f", {counts['tolerance']} within the tolerance"
    print(f"{held}, {counts['different']} different")
    for pattern, key, reason in LEFT_OUT:
        print(f"not compared: {key} in {pattern} ({reason})")
    if not sum(counts.values()):
        sys.exit("no files: give two folders of make")
    return counts["different"]


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _compare_file(first: Path, second: Path, name: str, tolerance: bool) -> tuple[str, list[str]]:
    """The verdict on two files, and what differs."""
    missing = [str(path) for path in (first, second) if not path.is_file()]
    if missing:
        return "different", [f"missing: {missing[0]}"]
    if first.read_bytes() == second.read_bytes():
        return "equal", []
    left_out = frozenset(key for pattern, key, _ in LEFT_OUT if fnmatch(name, pattern))
    look = _reader(name)
    found = list(look(first, second, Rule(left_out)))
    if not found:
        return "equal", []
    bound = next((bound for pattern, bound in BOUNDS if fnmatch(name, pattern)), None)
    if tolerance and bound is not None:
        found = list(look(first, second, Rule(left_out, bound)))
        if not found:
            return "tolerance", []
    return "different", found


def _reader(name: str) -> Callable[[Path, Path, Rule], Differences]:
    """The comparison for a file of this name."""
    if fnmatch(name, "*/parts/*"):
        return _compare_bytes
    suffixes = {
        ".csv": _compare_tables,
        ".json": _compare_records,
        ".toml": _compare_records,
        ".png": _compare_pictures,
        ".pt": _compare_checkpoints,
    }
    if fnmatch(name, "explained/*.h5"):
        return _compare_hdf5
    return suffixes.get(Path(name).suffix, _compare_bytes)


def _compare_bytes(first: Path, second: Path, rule: Rule) -> Differences:
    one, two = first.read_bytes(), second.read_bytes()
    if one != two:
        shorter = min(len(one), len(two))
        places = (k for k in range(shorter) if one[k] != two[k])
        yield f"{len(one)} and {len(two)} bytes, first other one at {next(places, shorter)}"


def _compare_tables(first: Path, second: Path, rule: Rule) -> Differences:
    tables = [list(csv.reader(path.open(newline=""))) for path in (first, second)]
    (head, *rows), (other_head, *other_rows) = tables
    if head != other_head or len(rows) != len(other_rows):
        yield f"{len(rows)} rows of {head}, {len(other_rows)} rows of {other_head}"
        return
    for number, (row, other) in enumerate(zip(rows, other_rows, strict=True), start=2):
        for column, cell, other_cell in zip(head, row, other, strict=True):
            if column not in rule.left_out and not _same_cell(cell, other_cell, rule.bound):
                yield f"line {number}, {column}: {cell} and {other_cell}"


def _same_cell(one: str, two: str, bound: float | None) -> bool:
    if one == two or bound is None:
        return one == two
    try:
        return _near(float(one), float(two), bound)
    except ValueError:
        return False


def _near(one: float, two: float, bound: float) -> bool:
    return one == two or abs(one - two) <= bound or (math.isnan(one) and math.isnan(two))


def _compare_records(first: Path, second: Path, rule: Rule) -> Differences:
    read = tomllib.loads if first.suffix == ".toml" else json.loads
    yield from _compare_values(read(first.read_text()), read(second.read_text()), rule)


def _compare_values(one: Any, two: Any, rule: Rule, place: str = "") -> Differences:
    """Differences of two nested values: mappings, lists, tensors, numbers, texts."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        yield from _compare_arrays(one.numpy(), two.numpy(), rule, place)
    elif isinstance(one, Mapping) and isinstance(two, Mapping):
        for key in one.keys() | two.keys():
            where = f"{place}.{key}" if place else str(key)
            if key in rule.left_out:
                continue
            if key not in one or key not in two:
                yield f"{where}: only in the {'first' if key in one else 'second'}"
            else:
                yield from _compare_values(one[key], two[key], rule, where)
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        for k, pair in enumerate(zip(one, two, strict=True)):
            yield from _compare_values(*pair, rule, f"{place}[{k}]")
    elif isinstance(one, float) and isinstance(two, float):
        if not _near(one, two, rule.bound or 0.0):
            yield f"{place}: {one} and {two}"
    elif type(one) is not type(two) or one != two:
        yield f"{place}: {one!r} and {two!r}"


def _compare_arrays(one: Any, two: Any, rule: Rule, place: str) -> Differences:
    if one.shape != two.shape or one.dtype != two.dtype:
        yield f"{place}: {one.dtype} {one.shape} and {two.dtype} {two.shape}"
    elif one.tobytes() != two.tobytes():
        if one.dtype.kind != "f":
            yield f"{place}: other values"
            return
        far = float(np.abs(one.astype(np.float64) - two.astype(np.float64)).max())
        if rule.bound is None or not far <= rule.bound:
            yield f"{place}: {far:.3g} apart"


def _compare_checkpoints(first: Path, second: Path, rule: Rule) -> Differences:
    one, two = (torch.load(path, weights_only=True) for path in (first, second))
    yield from _compare_values(one, two, rule)


def _compare_hdf5(first: Path, second: Path, rule: Rule) -> Differences:
    with h5py.File(first) as one, h5py.File(second) as two:
        names = [set[str](), set[str]()]
        one.visit(names[0].add)
        two.visit(names[1].add)
        if names[0] != names[1]:
            yield f"{sorted(names[0])} and {sorted(names[1])}"
            return
        for name in sorted(names[0]):
            if isinstance(one[name], h5py.Dataset):
                yield from _compare_arrays(one[name][()], two[name][()], rule, name)


def _compare_pictures(first: Path, second: Path, rule: Rule) -> Differences:
    one, two = (np.asarray(Image.open(path)).astype(np.float64) for path in (first, second))
    if one.shape != two.shape:
        yield f"{one.shape} and {two.shape}"
    elif (far := float(np.abs(one - two).mean())) > (rule.bound or 0.0):
        yield f"pixels {far:.3g} of 255 apart in the mean"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="run everything in a new folder")
    making.add_argument("out", type=Path)
    comparing = commands.add_parser("compare", help="compare two such folders")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--tolerance", action="store_true", help="numbers within bounds")
    given = parser.parse_args(arguments)
    if given.command == "make":
        make(given.out)
        return 0
    return int(compare(given.before, given.after, tolerance=given.tolerance) > 0)


if __name__ == "__main__":
    sys.exit(main())
