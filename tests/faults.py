"""Faults: kills, full disks, file-size limits and read-only folders, for every command that writes.

    python tests/faults.py --kills 100 train-agg crossval

After a fault the same command runs again, undisturbed. It must succeed, and give the bytes of a run
that nothing disturbed; what was complete before is the same file as before; no scratch is left. A
command that an error has ended says so in one line and ends with 2. ``make faults`` makes a hundred
kills of six of them and a quarter of that of the others, the suite two of the six
(tests/test_faults.py).

Each try is a fork of a process that has imported everything, so it takes a fraction of a second.
Full disks and read-only folders are tmpfs, which need the right to mount.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MOST = 40_000_000  # bytes of the largest disk, the smallest being of a thousandth
LARGE = 200_000_000  # bytes of a disk on which everything fits
LARGEST_FILE = 200_000  # bytes of the highest limit of files
PRELOAD = ("torch", "command_line", "dragn_cache.studies.crossval", "dragn_cache.runs.explain")
TIMED = re.compile(rb"  (trainings/.*|folds\.csv|summary\.csv|.*\.png)$")
LEFT_OUT = (".png",)  # pictures, and none of them is read again


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        make: writes what it reads into a folder.
        words: its words; ``{in}`` is that folder, ``{out}`` what it writes.
        begin: a folder in ``{in}`` that ``{out}`` is a copy of at first; empty for none.
        kept: patterns of files in ``{out}`` that are complete as soon as they exist.
        goes_on: it may be repeated when all is done; else it refuses what is there.
        often: whether all kills are made, or a quarter of them.
    """

    make: Callable[[Path], object]
    words: str
    begin: str = ""
    kept: Sequence[str] = ()
    goes_on: bool = False
    often: bool = False


# --- what they read ----------------------------------------------------------------------------


def make_store(folder: Path) -> Path:
    from run_stores import make_bags, make_features, with_splits, write_store

    bags = with_splits(make_bags(40))
    return write_store(folder / "s", bags, make_features(bags, most=5)).path


def make_export(folder: Path) -> None:
    from command_line import ok

    ok("export", make_store(folder), "--layout", "torchmil", "--tap", "gap", "--out", folder / "x")


def make_run(folder: Path) -> None:
    from command_line import ok

    words = f"--aggregator abmil {TRAIN} --out {folder / 'r'}".split()
    ok("train-agg", "--store", make_store(folder), *words)


def make_update(folder: Path) -> None:
    """A store of some images, and the data set with others, more and fewer."""
    import numpy as np
    from command_line import ok
    from conftest import draw_image, write_dataset

    data = write_dataset(folder / "d", [2, 3, 1, 4, 2, 3, 2, 4, 1, 3])
    ok("extract", "--dataset", data, "--out", folder / "s", *EXTRACT.split())
    table = data / "bags.csv"
    bags = table.read_text().splitlines()
    draw_image(data / "img" / "new.png", np.random.default_rng(7), 41, 53)
    draw_image(data / "img" / "003_1.png", np.random.default_rng(8), 41, 53)
    table.write_text("\n".join([bags[0], *bags[2:], "new,actin,s0"]) + "\n")
    rows = (data / "instances.csv").read_text().splitlines()
    rows = [row for row in rows if not row.startswith("000,")]
    (data / "instances.csv").write_text("\n".join([*rows, "new,img/new.png,0"]) + "\n")


EXTRACT = (
    "--backbone shufflenet_v2_x0_5 --weights random:3 --taps stage2,gap --size 32x48 "
    "--part-instances 4 --batch-size 4 --workers 0"
)
TRAIN = "--epochs 2 --intervals 20"
COMMANDS = {
    "import": Command(
        make_export,
        "import {in}/x --part-instances 20 --out {out}",
        kept=["parts/0*"],
        goes_on=True,
        often=True,
    ),
    "import-zarr": Command(
        make_export,
        "import {in}/x --part-instances 20 --format zarr --out {out}",
        kept=["parts/0*/**/*"],
        goes_on=True,
    ),
    "export-torchmil": Command(
        make_store, "export {in}/s --layout torchmil --tap gap --out {out}", often=True
    ),
    "export-zarr": Command(make_store, "export {in}/s --layout zarr --out {out}"),
    "export-clam": Command(make_store, "export {in}/s --layout clam --out {out}"),
    "export-hdf5": Command(make_store, "export {in}/s --layout hdf5 --out {out}"),
    "export-anndata": Command(make_store, "export {in}/s --layout anndata --out {out}"),
    "train-agg": Command(
        make_store,
        f"train-agg --store {{in}}/s --aggregator abmil {TRAIN} --out {{out}}",
        often=True,
    ),
    "crossval": Command(
        make_store,
        "crossval --store {in}/s --aggregator mean,abmil --folds 3 --seeds 1 --jobs 1 "
        f"{TRAIN} --out {{out}}",
        kept=["trainings/*/*.json"],
        goes_on=True,
        often=True,
    ),
    "explain": Command(make_run, "explain {in}/r --store {in}/s --no-h5 --out {out}", often=True),
    "explain-h5": Command(make_run, "explain {in}/r --store {in}/s --out {out}"),
    "predict": Command(make_run, "predict {in}/r --store {in}/s --out {out}"),
    "evaluate": Command(make_run, "evaluate {in}/r --out {out}"),
    "extract-update": Command(
        make_update,
        f"extract --dataset {{in}}/d --update {EXTRACT} --out {{out}}",
        begin="s",
        kept=["parts/0*"],
        goes_on=True,
        often=True,
    ),
    "simulate": Command(
        lambda folder: None, "simulate --bags 5 --size 64x64 --out {out}", goes_on=True
    ),
}


# --- one run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """The end of a command: its exit code, or minus the signal that ended it, and its words."""

    code: int
    text: str


def start(words: Sequence[str], limit: int | None = None) -> tuple[int, int]:
    """Fork a child that runs the program; its process number, and a pipe with all that it says.

    Args:
        limit: of the bytes of a file that it writes.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    code = 70
    try:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["dragn-cache", *words]
        from dragn_cache_cli.app import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of(child: int, reader: int) -> End:
    with open(reader, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return End(os.waitstatus_to_exitcode(status), text)


def measured(name: str, content: bytes) -> bytes:
    """A file's bytes without durations, which differ each time."""
    if name.endswith(".json") and "/trainings/" in name:
        record = json.loads(content)
        timed = ("seconds", "sha256")
        return json.dumps({k: v for k, v in record.items() if k not in timed}).encode()
    if name.endswith("SHA256SUMS"):
        return b"\n".join(line for line in content.splitlines() if not TIMED.search(line))
    if name.endswith(("folds.csv", "summary.csv")):
        rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
        keep = [k for k, column in enumerate(rows[0]) if not column.startswith("seconds")]
        return repr([[row[k] for k in keep] for row in rows]).encode()
    return b"" if name.endswith(LEFT_OUT) else content


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder by its path, hidden or not: a file's bytes, None for a folder."""
    paths = [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*"))]
    return {n: None if p.is_dir() else measured(f"/{n}", p.read_bytes()) for n, p in paths}


class BrokenError(AssertionError):
    """Something that a fault must not do."""


# --- tries -------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of tries: of each kind, those that the fault ended, and those that went on."""

    tries: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def count(self, kind: str, was_ended: bool) -> None:
        self.tries[kind] = self.tries.get(kind, 0) + 1
        self.ended[kind] = self.ended.get(kind, 0) + was_ended


class Tries:
    """Tries of one command in a folder of its own."""

    def __init__(self, name: str, folder: Path, seed: int = 0) -> None:
        import torch

        torch.set_num_threads(1)  # the children are forked
        self.name, self.command = name, COMMANDS[name]
        self.sound, self.work = folder / "in", folder / "work"
        self.out = self.work / "out"
        self.words = self.command.words.format(**{"in": self.sound, "out": self.out}).split()
        self.rng = random.Random(f"{name} {seed}")
        self.tally = Tally()
        self.sound.mkdir(parents=True)
        self.work.mkdir()
        self.command.make(self.sound)
        self._run_here()
        self.seconds = min(self._time_whole(), self._time_whole())

    def _run_here(self) -> None:
        """Run it in this process, so that what is imported late is there in every child."""
        from command_line import ok

        self.begin()
        ok(*self.words)
        self.clear()

    def _time_whole(self) -> float:
        """The seconds of an undisturbed run, which leaves its result in memory."""
        self.begin()
        started = time.perf_counter()
        end = end_of(*start(self.words))
        seconds = time.perf_counter() - started
        if end.code != 0:
            raise BrokenError(f"undisturbed it ends with {end.code}: {end.text[-500:]}")
        self.whole = contents(self.work)
        self.bytes = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        self.clear()
        return seconds

    def begin(self) -> None:
        if self.command.begin:
            shutil.copytree(self.sound / self.command.begin, self.out)

    def clear(self) -> None:
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def complete(self) -> dict[str, tuple[int, int]]:
        """The identity and time of files that are complete, by path; of new outputs all."""
        names = [p for k in self.command.kept for p in self.out.glob(k)]
        if not self.command.kept and self.out.exists():
            names = [self.out, *self.out.rglob("*")]
        stats = {str(path): path.stat() for path in names if path.is_file()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    def go_on(self, fault: str, before: Mapping[str, tuple[int, int]]) -> None:
        """Run the same command again; raise `BrokenError` unless all is as if nothing had happened.

        Args:
            fault: what happened before, for messages.
            before: `complete` when it had happened.
        """
        is_done = self.out.exists() and not self.command.goes_on
        end = end_of(*start(self.words))
        if end.code != (2 if is_done else 0):
            raise BrokenError(
                f"{fault}: the same command again ends with {end.code}: {end.text[-800:]}"
            )
        after = self.complete()
        changed = [name for name, stat in before.items() if after.get(name) != stat]
        # What an update replaces is complete too, and goes when nothing names it any more.
        changed = [n for n in changed if n in after or self.relative(n) in self.whole]
        if changed:
            raise BrokenError(f"{fault}: going on has rewritten {changed}")
        self.compare(fault)

    def relative(self, name: str) -> str:
        return Path(name).relative_to(self.work).as_posix()

    def compare(self, fault: str) -> None:
        now = contents(self.work)
        names = sorted(set(now) ^ set(self.whole))
        if names:
            raise BrokenError(f"{fault}: files that are left or missing: {names}")
        other = [name for name, content in self.whole.items() if now[name] != content]
        if other:
            raise BrokenError(f"{fault}: other bytes in {other}")

    def require_refusal(self, fault: str, end: End) -> bool:
        """Whether the fault ended the command; raise `BrokenError` unless that was in one line."""
        if end.code == 0:
            return False
        errors = [line for line in end.text.splitlines() if line.startswith("error: ")]
        if end.code != 2 or len(errors) != 1 or "internal" in end.text or "Trace" in end.text:
            raise BrokenError(f"{fault}: ended with {end.code}: {end.text[-1500:]}")
        return True

    # --- kinds ---

    def kill(self) -> bool:
        """SIGKILL at a random moment; whether it came before the end."""
        self.begin()
        child, reader = start(self.words)
        moment = self.rng.uniform(0, self.seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        end = end_of(child, reader)
        fault = f"killed after {moment:.3f} of {self.seconds:.3f} s"
        if end.code not in (0, -signal.SIGKILL):
            raise BrokenError(f"{fault}: ended with {end.code}: {end.text[-800:]}")
        self.go_on(fault, self.complete())
        self.clear()
        # What one run takes changes with the machine's other work: moments follow it.
        self.seconds *= 1.02 if end.code else 0.9
        return end.code != 0

    def fill(self, size: int) -> bool:
        """A disk of that many bytes above what is there at first, later larger."""
        with self.disk():
            self.begin()
            have = sum(path.stat().st_blocks * 512 for path in self.work.rglob("*"))
            self.remount(f"size={have + size}")
            fault = f"a disk with {size} bytes left"
            was_ended = self.require_refusal(fault, end_of(*start(self.words)))
            self.remount(f"size={LARGE}")
            self.go_on(fault, self.complete())
        return was_ended

    def limit(self, size: int) -> bool:
        """A limit of the size of files."""
        self.begin()
        fault = f"files of {size} bytes at most"
        was_ended = self.require_refusal(fault, end_of(*start(self.words, size)))
        self.go_on(fault, self.complete())
        self.clear()
        return was_ended

    def forbid(self) -> bool:
        """A folder that cannot be written to, later it can."""
        with self.disk():
            self.begin()
            self.remount("ro")
            was_ended = self.require_refusal("read-only", end_of(*start(self.words)))
            self.remount("rw")
            self.go_on("read-only", self.complete())
        return was_ended

    @contextmanager
    def disk(self) -> Iterator[None]:
        """A tmpfs in the working folder."""
        words = ["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "faults", str(self.work)]
        subprocess.run(words, check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(self.work)], check=True)

    def remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.work)], check=True)

    # --- all of them ---

    def run(self, kind: str, once: Callable[[], bool]) -> None:
        try:
            self.tally.count(kind, once())
        except BrokenError as fault:
            self.tally.faults.append(f"{self.name}: {fault}")
            self.clear()

    def run_kills(self, count: int) -> None:
        """As many kills that come before the end."""
        for _ in range(3 * count):
            if self.tally.ended.get("kills", 0) + len(self.tally.faults) >= count:
                return
            self.run("kills", self.kill)

    def run_disks(self, count: int) -> None:
        """Full disks from 40 kB to 40 MB, and as many up to what the command needs."""
        steps = [MOST / 1000 ** (k / max(1, count - 1)) for k in range(count)]
        steps += [4096 + (self.bytes + 40_000) * (k + 0.5) / count for k in range(count)]
        for size in sorted(map(int, steps)):
            self.run("full disks", lambda size=size: self.fill(size))  # type: ignore[misc]
        self.run("read-only folders", self.forbid)

    def run_limits(self, count: int) -> None:
        for size in [int(LARGEST_FILE * ((k + 0.5) / count) ** 3) for k in range(count)]:
            self.run("file limits", lambda size=size: self.limit(size))  # type: ignore[misc]


def why_no_disks(folder: Path) -> str:
    """Why no tmpfs can be mounted; empty if one can."""
    place = folder / "mount"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=65536", "faults", str(place)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        subprocess.run(["umount", str(place)], check=True)
    return done.stderr.strip() if done.returncode else ""


def try_all(name: str, asked: argparse.Namespace) -> bool:
    """Make the tries of one command and print their counts; whether there was no fault."""
    started = time.perf_counter()
    kills = asked.kills if COMMANDS[name].often else asked.kills // 4
    with tempfile.TemporaryDirectory() as place:
        tries = Tries(name, Path(place) / name, asked.seed)
        tries.run_kills(kills)
        tries.run_limits(asked.limits)
        reason = why_no_disks(Path(place))
        if not reason:
            tries.run_disks(asked.disks)
    tally = tries.tally
    told = [f"{tally.ended[kind]} of {tally.tries[kind]} {kind}" for kind in tally.tries]
    told += [f"no full disks and read-only folders: {reason}"] if reason else []
    told += [f"one run {tries.seconds:.2f} s, all {time.perf_counter() - started:.0f} s"]
    lines = [f"{name}: ended by {', '.join(told)}; {len(tally.faults)} faults", *tally.faults]
    sys.stdout.write("\n  ".join(lines) + "\n")
    sys.stdout.flush()
    return not tally.faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(COMMANDS))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--limits", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for module in PRELOAD:
        importlib.import_module(module)
    waiting, running, failed = list(asked.names or COMMANDS), 0, False
    while waiting or running:
        if waiting and running < asked.jobs:
            name, running = waiting.pop(0), running + 1
            if os.fork() == 0:
                is_sound = False
                try:
                    is_sound = try_all(name, asked)
                except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
                    traceback.print_exc()
                finally:
                    os._exit(int(not is_sound))
        else:
            failed, running = bool(os.wait()[1]) or failed, running - 1
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
