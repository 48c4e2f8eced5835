"""Kill extractions at random moments, let them go on, and compare every byte.

    python tests/kills.py --kills 200

One or three processes write one store, in both formats. Between the first and the last part's
appearance one of them, or all, get SIGKILL. Whoever is left finishes the store; if nobody is, the
same number of processes starts again. A kill counts only if parts existed and parts were missing.
The suite makes ten of these kills (tests/extraction/test_kills.py).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import write_dataset
from folder_bytes import tree

from dragn_cache.extraction.config import ExtractConfig
from dragn_cache.extraction.extract import extract
from dragn_cache.manifest import Manifest, read_manifest
from dragn_cache.store import FORMATS, open_store

SIZES = [7, 31, 23, 12, 29, 38, 3, 35]
CONFIG = ExtractConfig(
    backbone="shufflenet_v2_x0_5",
    weights="random:3",
    taps=("stage2", "gap"),
    size=(32, 48),
    part_instances=20,
    batch_size=8,
    workers=0,
)


@dataclass(frozen=True)
class Outcome:
    """One kill: whether it fell between the first and the last part, and how many were killed."""

    counted: bool
    killed: int


class Kills:
    """Repeated kills of one format and number of processes, in a folder of its own."""

    def __init__(self, folder: Path, format: str, processes: int, seed: int) -> None:
        torch.set_num_threads(1)  # the children are forked
        self.folder, self.processes = folder, processes
        self.manifest: Manifest = read_manifest(write_dataset(folder / "data", SIZES))
        self.config = CONFIG.replace(format=format)
        self.rng = random.Random(f"{format} {processes} {seed}")
        whole = folder / "whole"
        started = time.perf_counter()
        extract(self.manifest, self.config, whole)
        self.seconds = time.perf_counter() - started
        self.whole = tree(whole)

    def once(self) -> Outcome:
        """Kill, go on, compare; raises AssertionError when a byte differs."""
        out = self.folder / "killed"
        children = [self._start(out) for _ in range(self.processes)]
        while not list((out / "parts").glob("0*")):
            time.sleep(0.0005)
        time.sleep(self.rng.uniform(0, self.seconds))
        victims = children if self.rng.random() < 0.5 else [self.rng.choice(children)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        counted = bool(open_store(out).missing_parts())
        codes = {pid: os.waitpid(pid, 0)[1] for pid in children}
        survivors = [code for pid, code in codes.items() if pid not in victims]
        assert not any(survivors), f"a process that was not killed ended with {survivors}"
        if not survivors:
            again = [self._start(out) for _ in range(self.processes)]
            assert not any(os.waitpid(pid, 0)[1] for pid in again), "going on failed"
        assert tree(out) == self.whole, "the store has other bytes than an undisturbed one"
        assert not [p for p in out.rglob("*") if p.is_dir() and p.name.startswith(".")]
        shutil.rmtree(out)
        return Outcome(counted, len(victims))

    def counted(self, kills: int) -> Iterator[Outcome]:
        """As many kills that count."""
        done = tried = 0
        while done < kills:
            tried += 1
            assert tried < 20 * kills, "the kills do not fall between the first and the last part"
            outcome = self.once()
            done += outcome.counted
            if outcome.counted:
                yield outcome

    def _start(self, out: Path) -> int:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                extract(self.manifest, self.config, out)
                code = 0
            except BaseException:
                traceback.print_exc()  # else nobody would see why the process ended
                raise
            finally:
                os._exit(code)
        return child


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill extractions, go on, compare every byte.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = [(format, processes) for format in FORMATS for processes in (1, 3)]
    for number, (format, processes) in enumerate(kinds):
        share = args.kills // len(kinds) + (number < args.kills % len(kinds))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            kills = Kills(Path(folder), format, processes, args.seed)
            outcomes = list(kills.counted(share))
            killed = sum(outcome.killed for outcome in outcomes)
            parts = len([name for name in kills.whole if name.startswith("parts/0")])
            sys.stdout.write(
                f"{format}, {processes} process(es): {share} kills of {killed} processes, "
                f"{parts} files of parts, every byte the same each time, "
                f"{time.perf_counter() - started:.0f} s\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
