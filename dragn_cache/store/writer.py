"""Writing a store: part by part, each complete or absent, byte for byte the same after a kill.

The rows of an unfinished part go to flat scratch files in a hidden folder, so memory depends
neither on the part nor on the bag. When all rows are written, their number is known, and the part
is written in one pass, fsynced and renamed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dragn_cache.errors import InputError, StoreError
from dragn_cache.files import (
    MOST_TABLE_BYTES,
    is_storable,
    read_limited,
    remove_tree,
    sync_folder,
    sync_tree,
    write_text,
)
from dragn_cache.manifest import Manifest
from dragn_cache.store.claims import Claims, describe_holder, how_to_end
from dragn_cache.store.formats import FORMATS
from dragn_cache.store.part import Failure, reading_part, require_sealed
from dragn_cache.store.part_writer import PartWriter
from dragn_cache.store.plan import PartPlan
from dragn_cache.store.schema import (
    StoreDescription,
    read_description,
    require_same_settings,
    write_description,
)
from dragn_cache.store.tables import (
    HALF_WRITTEN,
    TABLES,
    failures_text,
    planned_bags,
    remove_leftovers,
    stored_parts,
    write_tables,
)
from dragn_cache.types import Say

_INTACT = "intact"  # a file in every scratch folder
_OURS = re.compile(rf"{HALF_WRITTEN.pattern}|parts")


class StoreWriter:
    """Writes a store, new or begun, perhaps together with other processes; see `open_writer`.

    Attributes:
        parts: every part of the store, as planned.
        claims: the parts that this process is working on.
    """

    def __init__(
        self,
        path: Path,
        description: StoreDescription,
        parts: Sequence[PartPlan],
        manifest: Manifest,
        say: Say,
    ) -> None:
        self.path, self.description, self.parts = path, description, list(parts)
        self.manifest, self.say = manifest, say
        self.format = FORMATS[description.format]
        self.claims = Claims(path / "parts")

    def part_path(self, part: PartPlan) -> Path:
        return self.path / "parts" / (part.name + self.format.suffix)

    def missing(self) -> list[PartPlan]:
        """Parts that are not complete yet: a part that exists is complete."""
        return [part for part in self.parts if not self.part_path(part).exists()]

    def claim_missing(self) -> Iterator[PartPlan]:
        """One pass over the parts that are missing: each that nobody else works on, claimed."""
        for part in self.parts:
            if self.part_path(part).exists() or not self.claims.acquire(part.name):
                continue
            if self.part_path(part).exists():  # completed between the check and the claim
                self.claims.release(part.name)
                continue
            yield part

    def others(self) -> list[str]:
        """A line for each missing part that another process holds: who, and how to end it."""
        held = {part.name: self.claims.path(part.name) for part in self.missing()}
        holders = {name: describe_holder(path) for name, path in held.items()}
        return [
            f"part {name}: {how_to_end(holder, held[name])}"
            for name, holder in holders.items()
            if holder
        ]

    @contextmanager
    def part(self, part: PartPlan) -> Iterator[PartWriter]:
        """Collect one part's rows; on a clean exit the part is written, synced and renamed."""
        folder = self.path / "parts" / f".{part.name}.{self.claims.token}"
        intact = folder / _INTACT
        if not self.claims.holds(part.name):
            self.claims.wait(part.name, self.say)
        try:
            folder.mkdir()
            intact.touch()
            description = self.description
            writer = PartWriter(folder, self.manifest, part, description.taps, description.views)
            try:
                yield writer
                self._complete(part, writer, folder)
            finally:
                writer.close()
        except FileNotFoundError:
            # If this process was suspended until its claim expired, another one has removed its
            # folder and writes the part. Any other missing file is an error.
            if intact.exists() or not (self.path / "parts").exists():
                raise
        finally:
            remove_tree(folder)
            self.claims.release(part.name)

    def _complete(self, part: PartPlan, writer: PartWriter, folder: Path) -> None:
        unfinished = folder / f"part{self.format.suffix}"
        index = writer.index()
        description = self.description
        self.format.write(unfinished, index, description.taps, description.views, writer.rows)
        sync_tree(unfinished)
        # Zarr makes missing folders anew: a part that lost its first files would look complete.
        (folder / _INTACT).stat()
        if not self.part_path(part).exists():  # another process may have been faster
            try:
                unfinished.rename(self.part_path(part))
            except OSError:  # no folder can be renamed onto one that another process has just made
                if not self.part_path(part).exists():
                    raise
            sync_folder(self.path / "parts")

    def failures(self) -> list[Failure]:
        """Inputs that could not be used, from the parts that exist (each stores its own)."""
        unused: list[Failure] = []
        for part in self.parts:
            path = self.part_path(part)
            if path.exists():
                ids = {self.manifest.bags[k].bag_id for k in part.bags}
                with reading_part(path):
                    index = self.format.read_index(path)
                    require_sealed(index, self.description)
                unused += [f for f in index.failures if f.bag_id in ids]
        return unused

    def finish(self) -> list[Failure]:
        """Write failures.csv and return its rows; remove files that nothing uses.

        These are files of dead processes, and parts that an update has replaced entirely.
        """
        failures = self.failures()
        self.claims.wait(TABLES, self.say)
        remove_leftovers(self.path)
        if self.description.revision and not self.missing():
            self._remove_replaced_parts()
        text = failures_text(failures)
        path = self.path / "failures.csv"
        if not path.is_file() or read_limited(path, MOST_TABLE_BYTES) != text.encode():
            write_text(path, text)
        self.claims.release(TABLES)
        return failures

    def _remove_replaced_parts(self) -> None:
        planned = {self.part_path(part) for part in self.parts}
        for path in (self.path / "parts").glob(f"[!.]*{self.format.suffix}"):
            if path not in planned:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Give up all claims."""
        self.claims.close()


def open_writer(
    path: Path,
    description: StoreDescription,
    parts: Sequence[PartPlan],
    manifest: Manifest,
    say: Say = lambda line: None,
) -> StoreWriter:
    """Make a store, or continue one of the same settings; other processes may write to it too.

    Args:
        parts: the plan for a new store; a store that exists keeps its own.
        say: called with whom a long wait is for.

    Raises:
        StoreMismatchError: the store there has other settings; the message names them.
        StoreError: the folder holds something else.
    """
    _require_store_or_nothing(path)
    _require_storable(manifest)
    (path / "parts").mkdir(parents=True, exist_ok=True)
    with Claims(path / "parts") as claims:
        claims.wait(TABLES, say)
        if (path / "store.json").exists():
            have = read_description(path)
            require_same_settings(path, have, description)
            description = have
            if have.revision:
                parts = stored_parts(path, have, manifest)
        else:
            description = replace(description, bags=planned_bags(parts, manifest))
            write_description(description, path)
        remove_leftovers(path)
        write_tables(path, parts, manifest)
    return StoreWriter(path, description, parts, manifest, say)


def _require_storable(manifest: Manifest) -> None:
    """Raise InputError for the first text of a manifest that no part could hold."""
    for bag in manifest.bags:
        images = (row.image for row in manifest.instances.get(bag.bag_id, ()))
        for text in (bag.bag_id, *images):
            if not is_storable(text):
                raise InputError(
                    f"bag {bag.bag_id[:60]!a}",
                    expected="ids and images of UTF-8 text without null characters",
                    got=ascii(text[:60]),
                    remedy="rename it",
                )


def _require_store_or_nothing(path: Path) -> None:
    """Raise StoreError for a folder that holds something else than a store or its beginning."""
    others = [p for p in path.iterdir() if not _OURS.fullmatch(p.name)] if path.is_dir() else []
    parts = path / "parts"
    others += [p for p in parts.iterdir() if p.name[0] != "."] if parts.is_dir() else []
    # Asked last: another process may begin the store while its files are listed.
    if (path / "store.json").exists():
        return
    if path.is_file() or others:
        raise StoreError(
            str(path),
            expected="a store, or a folder that is empty or does not exist yet",
            got="a file" if path.is_file() else f"a folder with {min(p.name for p in others)}",
            remedy="give another `out`",
        )
