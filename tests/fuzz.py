"""Fuzzing: mutated bytes of every kind of file, read by the commands in a child under limits.

``make fuzz`` gives each boundary a minute, the suite a second (tests/test_fuzz.py). One child tries
them one after the other. A case is a fault where a command ends in "internal", a
traceback or a signal, takes more than `CASE_SECONDS`, or leaves a temporary folder; memory above
`CASE_BYTES` makes the command fail by itself, which must be in one line. Case k of a seed is always
the same: ``python tests/fuzz.py pt --seed 0 --first 123 --seconds 1`` shows it again.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CASE_SECONDS = 30
MOST_FAULTS = 5  # of a boundary: more are not shown, and a child that dies is not replaced
CASE_BYTES = 2 * 2**30  # above the size that the child has after its imports
TOKENS = (
    *(b"\0", b"\xff\xfe", b"\r", b'"', b"'", b",", b"\n", b"[" * 3000, b"{" * 3000, b"\xc2\xb2"),
    *(b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"9" * 5000, b"../../x", b"\xed\xb3\xbf"),
)
ODD = (None, True, -1, 0, 1, 2**63, 2**64, 1e300, "", "x", "\0", "../x", "²", [], {}, [[]], ["x"])


@dataclass(frozen=True)
class Boundary:
    """Files that come from others, and the commands that read them.

    Attributes:
        make: writes a sound set of files into a folder.
        files: patterns of those to change.
        commands: words; ``{in}`` is the folder, ``{out}`` a path where nothing is.
    """

    make: Callable[[Path], object]
    files: Sequence[str]
    commands: Sequence[str]


# --- sound files --------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    from conftest import write_dataset

    write_dataset(folder / "d", [2, 1, 3])


def make_store(folder: Path) -> Path:
    from run_stores import make_bags, make_features, with_splits, write_store

    bags = with_splits(make_bags(20))
    return write_store(folder / "s", bags, make_features(bags, most=3)).path


def exported(layout: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from dragn_cache.interop import export_features
        from dragn_cache.store import open_store

        store = open_store(make_store(folder))
        out = folder / {"anndata": "x.h5ad", "hdf5": "x.h5"}.get(layout, "x")
        export_features(store, out, layout=layout)

    return make


def make_zarr_store(folder: Path) -> None:
    from command_line import ok

    exported("zarr")(folder)
    ok("import", folder / "x", "--out", folder / "z", "--format", "zarr")


def make_npz(folder: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        folder / "x.npz",
        features=rng.random((5, 3), np.float32),
        offsets=np.array([0, 2, 5]),
        bag_ids=["a", "b"],
        targets=np.eye(2, dtype=np.int64),
        labels=["l", "m"],
    )


def make_tensors(folder: Path) -> None:
    import torch

    (folder / "x").mkdir()
    torch.save(torch.rand(3, 5), folder / "x" / "a.pt")
    torch.save({"features": [torch.rand(5)] * 2, "coords": torch.ones(2, 2)}, folder / "x" / "b.pt")


def make_run(folder: Path) -> None:
    from command_line import ok

    store = make_store(folder)
    ok("train-agg", "--store", store, "--out", folder / "r", "--epochs", 1, "--aggregator", "mean")


CROSSVAL = "crossval --aggregator mean --epochs 1 --folds 3 --seeds 1 --jobs 1"


def make_crossval(folder: Path) -> None:
    from command_line import ok

    store = make_store(folder)
    ok(*CROSSVAL.split(), "--store", store, "--out", folder / "c")


BOUNDARIES = {
    "tables": Boundary(make_data, ["d/*.csv"], ["check {in}/d"]),
    "toml": Boundary(make_data, ["d/dataset.toml"], ["check {in}/d"]),
    "images": Boundary(make_data, ["d/img/*"], ["check {in}/d"]),
    "store": Boundary(
        make_store,
        ["s/store.json", "s/manifest/*"],
        ["info {in}/s", "verify {in}/s", "export {in}/s --layout torchmil --tap gap --out {out}"],
    ),
    "parts": Boundary(make_store, ["s/parts/*"], ["info {in}/s", "verify {in}/s"]),
    "zarr": Boundary(
        make_zarr_store,
        ["x/**/zarr.json", "z/**/zarr.json"],
        ["import {in}/x --out {out}", "info {in}/z", "verify {in}/z"],
    ),
    "hdf5": Boundary(exported("hdf5"), ["x.h5"], ["import {in}/x.h5 --out {out}"]),
    "clam": Boundary(exported("clam"), ["x/**/*.*"], ["import {in}/x --out {out}"]),
    "h5ad": Boundary(exported("anndata"), ["x.h5ad"], ["import {in}/x.h5ad --out {out}"]),
    "npz": Boundary(make_npz, ["x.npz"], ["import {in}/x.npz --out {out}"]),
    "npy": Boundary(exported("torchmil"), ["x/**/*.*"], ["import {in}/x --out {out}"]),
    "pt": Boundary(make_tensors, ["x/*"], ["import {in}/x --out {out}"]),
    "run": Boundary(
        make_run,
        ["r/checkpoint.pt", "r/*.csv", "r/*.toml", "r/*.json"],
        ["evaluate {in}/r --out {out}", "predict {in}/r --store {in}/s --out {out}"],
    ),
    "crossval": Boundary(
        make_crossval,
        ["c/config.toml", "c/trainings/*/*"],
        [f"{CROSSVAL} --store {{in}}/s --out {{in}}/c"],
    ),
}


# --- mutations ----------------------------------------------------------------------------------


def mutated(name: str, content: bytes, rng: np.random.Generator) -> bytes:
    """Other bytes; of JSON often one value, of an archive often one member under its checksum."""
    if name.endswith(".json") and rng.random() < 0.6:
        return _other_value(content, rng)
    if zipfile.is_zipfile(io.BytesIO(content)) and rng.random() < 0.8:
        return _other_member(content, rng)
    for _ in range(int(rng.integers(1, 4))):
        content = _other_bytes(content, rng)
    return content


def _other_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    start, stop = sorted(int(k) for k in rng.integers(0, len(content) + 1, 2))
    # Headers lie at the beginning: half of the places are there.
    place = int(rng.integers(0, max(1, min(len(content), 512) if rng.random() < 0.5 else start)))
    piece = content[place : place + int(rng.integers(1, 9))]
    kind = rng.integers(7)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:place] + content[place + len(piece) :]
    if kind == 2:
        return content[:stop] + piece * int(rng.integers(1, 50)) + content[stop:]
    if kind == 3:
        return content[:place] + TOKENS[rng.integers(len(TOKENS))] + content[place:]
    if kind == 4:
        value = int(rng.choice([0, 1, 127, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1]))
        size = int(rng.choice([1, 2, 4, 8]))
        number = (value % 2 ** (8 * size)).to_bytes(size, "little")
        return content[:place] + number + content[place + size :]
    flipped = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        if flipped:
            at = int(rng.integers(len(flipped)) if kind == 5 else min(place, len(flipped) - 1))
            flipped[at] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def _other_value(content: bytes, rng: np.random.Generator) -> bytes:
    """One value, at any depth, is replaced or removed; the record's own digests follow."""
    from dragn_cache.store import json_digest
    from dragn_cache.studies.folder import DIGEST

    record = json.loads(content)
    places: list[tuple[Any, Any]] = []
    waiting = [record]
    while waiting:
        value = waiting.pop()
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        places += [(value, key) for key, _ in pairs]
        inner = value.values() if isinstance(value, dict) else value
        waiting += [v for v in inner if isinstance(v, dict | list)]
    holder, key = places[rng.integers(len(places))]
    if rng.random() < 0.15:
        del holder[key]
    else:
        holder[key] = ODD[rng.integers(len(ODD))]
    provenance = record.get("provenance") if isinstance(record, dict) else None
    digests = record.get("digests") if isinstance(record, dict) else None
    if isinstance(provenance, dict) and isinstance(digests, dict):
        digests |= {kind: json_digest(v) for kind, v in provenance.items()}
        digests.pop("file", None)
        digests["file"] = json_digest(record)
    elif isinstance(record, dict) and record.pop(DIGEST, None):
        record[DIGEST] = json_digest(record)
    return json.dumps(record).encode()


def _other_member(content: bytes, rng: np.random.Generator) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        names = old.namelist()
        named = [n for n in names if n.endswith(("data.pkl", ".npy"))] or names
        chosen = named[rng.integers(len(named))]
        for name in names:
            member = old.read(name)
            new.writestr(name, _other_bytes(member, rng) if name == chosen else member)
    return written.getvalue()


# --- the child ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tries:
    """Cases of one boundary, whose sound files are in ``folder``."""

    name: str
    folder: Path
    seed: int

    @property
    def place(self) -> Path:
        return self.folder / self.name

    def chosen(self, case: int) -> tuple[Path, np.random.Generator]:
        """The file to change, below the sound files, and the numbers that change it."""
        rng = np.random.default_rng([self.seed, case])
        sound = self.place / "sound"
        found = {f for p in BOUNDARIES[self.name].files for f in sound.glob(p) if f.is_file()}
        files = sorted(found)
        return files[rng.integers(len(files))].relative_to(sound), rng

    def faults(self, case: int) -> Iterator[str]:
        """What is wrong with what the commands do; case 0 is the sound files, which all take."""
        from command_line import run

        work, out = self.place / "work", self.place / "out"
        scratch = self.folder / "tmp"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.place / "sound", work)
        if case > 0:
            name, rng = self.chosen(case)
            (work / name).write_bytes(mutated(name.name, (work / name).read_bytes(), rng))
            if rng.random() < 0.7:  # else the digests beside the file tell
                _renew_checksums(work / name)
        for command in BOUNDARIES[self.name].commands:
            words = [w.format(**{"in": work, "out": out}) for w in command.split()]
            result = run(*words)
            shutil.rmtree(out, ignore_errors=True)
            left = [p.name for p in [*scratch.iterdir(), *self.place.glob(".out*")]]
            codes = (0, 1, 2) if case > 0 else (0,)
            raised = result.exception
            crashed = raised is not None and not isinstance(raised, SystemExit)
            loud = "internal:" in result.output or "Traceback" in result.output
            if crashed or loud or left or result.exit_code not in codes:
                yield f"{command}: {result.output[-500:]} {raised!r} {left}"


def _renew_checksums(path: Path) -> None:
    from dragn_cache.checksums import CHECKSUMS, write_checksums

    folder = path.parent
    while not (folder / CHECKSUMS).is_file() and folder != folder.parent:
        folder = folder.parent
    if (folder / CHECKSUMS).is_file() and path.name != CHECKSUMS:
        write_checksums(folder)


def run_child(names: Sequence[str], folder: Path, seed: int, first: int, seconds: float) -> None:
    """Try cases; a line of JSON on the true stdout before each, for each fault, and at the end.

    Args:
        first: number of the first boundary's first case behind the sound files.
        seconds: for each boundary, behind the sound files.
    """
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    told = os.dup(1)

    def tell(**line: object) -> None:
        os.write(told, json.dumps(line).encode() + b"\n")

    for name in names:
        tries = Tries(name, folder, seed)
        tell(name=name, case=0, file="")
        for fault in tries.faults(0):
            tell(fault=fault)
        _limit_memory()  # what the commands import is there by now
        end = time.monotonic() + seconds
        for case in itertools.count(max(first, 1)):
            tell(name=name, case=case, file=str(tries.chosen(case)[0]))
            for fault in tries.faults(case):
                tell(fault=fault)
            if time.monotonic() > end:
                break
        first = 0
    tell(name=None, case=0, file="")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + CASE_BYTES, most))


# --- the parent ---------------------------------------------------------------------------------


@dataclass
class Report:
    """The cases tried at a boundary, and the faults found: case, file and what happened."""

    cases: int = 0
    faults: list[str] = field(default_factory=list)


def fuzz(
    names: Sequence[str], seconds: float, *, seed: int = 0, first: int = 0
) -> dict[str, Report]:
    """Try boundaries, each for some time; a child that dies is replaced.

    Args:
        first: number of the first case, where there is one boundary.
    """
    reports = {name: Report() for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "tmp").mkdir()
        for name in names:
            (folder / name / "sound").mkdir(parents=True)
            BOUNDARIES[name].make(folder / name / "sound")
        left = list(names)
        while left:
            name, case, how = _follow(left, folder, seed, first, seconds, reports)
            if name is None:
                break
            reports[name].faults.append(how)
            # A boundary whose child has died goes on behind that case, unless that is no news.
            is_over = case == 0 or len(reports[name].faults) >= MOST_FAULTS
            left = left[left.index(name) + is_over :]
            first = 0 if is_over else case + 1
    return reports


def _follow(
    names: Sequence[str],
    folder: Path,
    seed: int,
    first: int,
    seconds: float,
    reports: dict[str, Report],
) -> tuple[str | None, int, str]:
    """Note what a child tells; the boundary and the case at which it ended before its time."""
    child = _start(names, folder, seed, first, seconds)
    told: dict[str, Any] = {"name": names[0], "case": 0, "file": ""}
    with child, child.stdout as lines:  # type: ignore[union-attr]
        while told["name"] is not None:
            # Case 0 takes as long as imports do.
            limit = CASE_SECONDS if told["case"] else 3 * CASE_SECONDS
            ready, _, _ = select.select([lines], [], [], limit)
            line = lines.readline() if ready else b""
            if not line:
                child.kill()
                how = f"ended by {child.wait()}" if ready else f"more than {limit} s"
                return told["name"], told["case"], f"case {told['case']}, {told['file']}: {how}"
            new = json.loads(line)
            if "fault" in new:
                where = f"case {told['case']}, {told['file']}"
                reports[told["name"]].faults.append(f"{where}: {new['fault']}")
                continue
            told = new
            if told["name"] is not None:
                reports[told["name"]].cases += 1
    return None, 0, ""


def _start(
    names: Sequence[str], folder: Path, seed: int, first: int, seconds: float
) -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
    words = [sys.executable, __file__, *names, "--child", str(folder), "--seed", str(seed)]
    paths = os.pathsep.join(p for p in (str(Path(__file__).parent), *sys.path) if p)
    return subprocess.Popen(
        [*words, "--first", str(first), "--seconds", str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env={**os.environ, **threads, "PYTHONPATH": paths},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(BOUNDARIES))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child is not None:
        run_child(asked.names, asked.child, asked.seed, asked.first, asked.seconds)
        return
    failed = False
    for name in asked.names or BOUNDARIES:
        (report,) = fuzz([name], asked.seconds, seed=asked.seed, first=asked.first).values()
        failed = failed or bool(report.faults)
        head = f"{name}: {report.cases} cases, {len(report.faults)} faults"
        lines = [head, *report.faults[:MOST_FAULTS]]
        sys.stdout.write("\n  ".join(lines) + "\n")
        sys.stdout.flush()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
