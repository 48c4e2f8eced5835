"""Change one bit, or cut a file short, and see that it is noticed: stores, runs, cross-validations.

    python tests/flips.py                  # everything: the half of `make faults`
    python tests/flips.py run --bits 200   # one folder, 200 seeded flips in all

A change must be noticed by ``verify`` or by reading (an error of ours, or a warning), or all that
commands read must be as before. Every bit is flipped of files up to 4 kB, and of what HDF5, Zarr
and torch files hold beside their numbers; 2,000 seeded bits of each other file; every file is cut
at 64 places. Pictures are left out. A change that ends a reader, or keeps it for 30 s, is a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from run_stores import make_bags, make_features, with_splits, write_store

from dragn_cache.errors import DragnCacheError
from dragn_cache.runs.checkpoint import load_checkpoint
from dragn_cache.runs.evaluate import SPLIT_COLUMNS
from dragn_cache.runs.folder import run_table
from dragn_cache.runs.train import train_run
from dragn_cache.runs.verify import verify_files
from dragn_cache.store import Store, open_store
from dragn_cache.store.config import Format
from dragn_cache.store.verify import verify_store
from dragn_cache.studies.config import CrossvalConfig
from dragn_cache.studies.crossval import crossval
from dragn_cache.studies.folder import read_config, read_training, verify_study
from dragn_cache.training.config import TrainConfig

SMALL_FILE = 4096
BITS_OF_LARGE = 2000
CUTS = 64
SECONDS = 30
PICTURES = (".png",)
NOTICED, WITHOUT_EFFECT = "noticed", "without effect"


@dataclass(frozen=True)
class Change:
    """A file, and the bit that is flipped in it or, for ``cut``, the length that it keeps."""

    file: str
    place: int
    cut: bool

    def apply(self, content: bytes) -> bytes:
        if self.cut:
            return content[: self.place]
        changed = bytearray(content)
        changed[self.place // 8] ^= 1 << self.place % 8
        return bytes(changed)


# --- what is read -------------------------------------------------------------------------------


def read_store(path: Path) -> tuple[bool, Callable[[], bytes]]:
    """Whether something is noticed in a store, and a digest of all that commands read from it."""
    notes: list[str] = []
    store = open_store(path, warn=notes.append)
    noticed = bool(notes) or not verify_store(store).is_whole
    return noticed, lambda: _digest(_all_of(store))


def _all_of(store: Store) -> Iterator[object]:
    yield store.description, store.name, store.task, store.labels
    yield [(b.bag_id, b.labels, b.split, b.group, b.extra) for b in store.bags]
    for number in store.parts:
        index = store.index(number)
        yield index.ids, index.images, index.failures
        yield from (index.offsets, index.digests, index.plans, index.boxes, index.order)
        yield index.image_digests
    # Features that verify has read give these digests; loading them finds their rows anew.
    yield store.sizes(store.bag_ids)


def read_run(path: Path) -> tuple[bool, Callable[[], bytes]]:
    """As `read_store`, of a run's folder."""

    def contents() -> Iterator[object]:
        _, checkpoint = load_checkpoint(path)
        yield checkpoint.config, checkpoint.in_shape, checkpoint.tap, checkpoint.labels
        yield checkpoint.task, checkpoint.best_epoch, checkpoint.decision, checkpoint.seen
        yield checkpoint.provenance
        yield from (values.numpy() for values in checkpoint.state.values())
        for name, columns in (("predictions.csv", ("bag_id",)), ("splits.csv", SPLIT_COLUMNS)):
            yield [(row.line, row.cells) for row in run_table(path, name, columns)]

    return bool(verify_files(path)), lambda: _digest(contents())


def read_study(path: Path) -> tuple[bool, Callable[[], bytes]]:
    """As `read_store`, of a cross-validation's folder."""

    def contents() -> Iterator[object]:
        yield read_config(path)
        for method in ("mean", "max"):
            yield [read_training(path, (method, 0, fold)) for fold in range(3)]

    return bool(verify_study(path)), lambda: _digest(contents())


def _digest(values: Iterator[object]) -> bytes:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.digest()


# --- folders ------------------------------------------------------------------------------------


def make_store(path: Path, form: Format) -> Store:
    bags = with_splits(make_bags(3))
    features = make_features(bags, most=2)
    features[bags[2].bag_id] = features[bags[2].bag_id][:0]
    return write_store(path, bags, features, form=form)


def make_run(path: Path) -> None:
    bags = with_splits(make_bags(20))
    store = write_store(path.with_name("of-run"), bags, make_features(bags, most=2))
    train_run(store, TrainConfig(aggregator="mean", epochs=1, intervals=0), path)


def make_study(path: Path) -> None:
    bags = make_bags(15)
    store = write_store(path.with_name("of-study"), bags, make_features(bags, most=2))
    train = TrainConfig(epochs=1, intervals=0)
    config = CrossvalConfig(
        aggregators=[("mean", {}), ("max", {})], folds=3, seeds=1, jobs=1, train=train
    )
    crossval(store, config, path)


FOLDERS: dict[
    str, tuple[Callable[[Path], object], Callable[[Path], tuple[bool, Callable[[], bytes]]]]
] = {
    "hdf5": (lambda path: make_store(path, "hdf5"), read_store),
    "zarr": (lambda path: make_store(path, "zarr"), read_store),
    "run": (make_run, read_run),
    "crossval": (make_study, read_study),
}


# --- places -------------------------------------------------------------------------------------


def changes(folder: Path, bits_of_large: int = BITS_OF_LARGE) -> list[Change]:
    """All changes to the files of a folder."""
    result = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in PICTURES):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        beside = range(size) if size <= SMALL_FILE else sorted(_beside_numbers(path))
        rng = np.random.default_rng(size)
        bits = {8 * byte + bit for byte in beside for bit in range(8)}
        bits |= set(rng.integers(0, 8 * size, bits_of_large).tolist() if size > SMALL_FILE else ())
        cuts = np.unique(np.linspace(0, size - 1, CUTS).astype(int)).tolist() if size else []
        result += [Change(name, bit, cut=False) for bit in sorted(bits)]
        result += [Change(name, length, cut=True) for length in cuts]
    return result


def _beside_numbers(path: Path) -> set[int]:
    """Bytes of an HDF5 or torch file that are no features or parameters; none of other files."""
    size = path.stat().st_size
    if path.suffix == ".h5":
        numbers: set[int] = set()

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and name.startswith("taps/") and item.size:
                start = item.id.get_offset()
                numbers.update(range(start, start + item.id.get_storage_size()))

        with h5py.File(path, "r") as file:
            file.visititems(visit)
        return set(range(size)) - numbers
    if path.suffix == ".pt":
        with zipfile.ZipFile(path) as archive:
            data = [info for info in archive.infolist() if "/data/" in info.filename]
        inside = {k for info in data for k in range(info.header_offset, info.header_offset + 64)}
        numbers = {
            k
            for info in data
            for k in range(info.header_offset + 64, info.header_offset + 64 + info.file_size)
        }
        return set(range(size)) - (numbers - inside)
    return set()


# --- trying -------------------------------------------------------------------------------------


def outcome(folder: Path, kind: str, change: Change, sound: bytes) -> str:
    """Apply a change, read the folder, undo the change; says what came of it."""
    path = folder / change.file
    content = path.read_bytes()
    path.write_bytes(change.apply(content))
    try:
        noticed, contents = FOLDERS[kind][1](folder)
        if noticed:
            return NOTICED
        return WITHOUT_EFFECT if contents() == sound else "read as something else"
    except DragnCacheError:
        return NOTICED
    except Exception as error:  # noqa: BLE001 - any other error is a fault
        return f"{type(error).__name__}: {error}"
    finally:
        path.write_bytes(content)


def _work(kind: str, original: Path, connection: Connection) -> None:
    """Take changes from a connection and send what came of each, on a copy of the folder."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=original.parent) as scratch:
        folder = Path(shutil.copytree(original, Path(scratch) / original.name))
        _, contents = FOLDERS[kind][1](folder)
        sound = contents()
        with contextlib.suppress(EOFError):
            while True:
                connection.send(outcome(folder, kind, connection.recv(), sound))


class Worker:
    """A process that may die or be stopped."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=_work, args=(kind, folder, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self.change: Change | None = None
        self.since = 0.0

    def give(self, change: Change) -> None:
        self.change, self.since = change, time.monotonic()
        self.connection.send(change)

    def result(self) -> str | None:
        """What came of the change; None while it is being tried."""
        try:
            if self.connection.poll():
                return str(self.connection.recv())
        except (EOFError, ConnectionError):
            self.process.join()
            return f"the reader ended with {self.process.exitcode}"
        if time.monotonic() - self.since > SECONDS:
            self.process.kill()
            self.process.join()
            return f"the reader took more than {SECONDS} s"
        return None

    @property
    def is_usable(self) -> bool:
        return self.process.is_alive()


def try_all(
    kind: str, folder: Path, todo: list[Change], jobs: int
) -> tuple[Counter[str], list[tuple[Change, str]]]:
    """Counts of what came of the changes, and the faults among them."""
    counts: Counter[str] = Counter()
    faults: list[tuple[Change, str]] = []
    waiting = iter(todo)
    workers = [Worker(kind, folder) for _ in range(jobs)]
    busy = []
    for worker in workers:
        if (change := next(waiting, None)) is not None:
            worker.give(change)
            busy.append(worker)
    while busy:
        wait([worker.connection for worker in busy], timeout=1)
        for worker in list(busy):
            text = worker.result()
            if text is None:
                continue
            assert worker.change is not None
            counts[text if text in (NOTICED, WITHOUT_EFFECT) else "fault"] += 1
            if text not in (NOTICED, WITHOUT_EFFECT):
                faults.append((worker.change, text))
            busy.remove(worker)
            if (change := next(waiting, None)) is not None:
                again = worker if worker.is_usable else Worker(kind, folder)
                again.give(change)
                busy.append(again)
    for worker in workers:
        worker.connection.close()
    return counts, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(FOLDERS), metavar="KIND")
    parser.add_argument("--bits", type=int, help="Only so many changes of each folder, seeded.")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    failed = False
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / kind
            FOLDERS[kind][0](folder)
            todo = changes(folder)
            if arguments.bits is not None:
                rng = np.random.default_rng(0)
                todo = [todo[k] for k in rng.choice(len(todo), arguments.bits, replace=False)]
            started = time.monotonic()
            counts, faults = try_all(kind, folder, todo, arguments.jobs)
        seconds = time.monotonic() - started
        lines = [f"{kind}: {len(todo)} changes in {seconds:.0f} s: {dict(counts)}"]
        lines += [f"  {change}: {text}" for change, text in faults[:40]]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        failed = failed or bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
