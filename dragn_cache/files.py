"""Files: opened only if they are regular, read within a limit, written completely or not at all.

Every file that may be of others is opened by way of `require_regular`: a pipe would be waited for
without end, a device fills the memory. What it raises is an `OSError` as opening raises one, so
that whoever opens the file names it in his own words.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import os
import shutil
import stat
import time
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dragn_cache.errors import InputError
from dragn_cache.machine import free_memory

MAX_NAME_BYTES = 255
LONGEST_CELL = 131_072  # characters: the csv module reads no longer ones
LONGEST_SUFFIX = ".npy"
REMOVALS = 7  # tries of `remove_tree`, in about two seconds

MOST_TEXT_BYTES = 2**24  # of TOML and JSON that describe something
MOST_TABLE_BYTES = 2**30  # of tables and of results by bag


def require_regular(path: str | os.PathLike[str], most: int | None = None) -> None:
    """Raise the `OSError` of a file that may not be opened, or not read into memory.

    Links are followed.

    Args:
        most: bytes that it may have.
    """
    status = Path(path).stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        reason = "a pipe, socket or device (copy what it gives into a file, and give that)"
        raise OSError(errno.EINVAL, reason, os.fspath(path))
    if most is not None and status.st_size > most:
        raise _too_large(path, status.st_size, most)


def require_regular_below(folder: Path) -> None:
    """`require_regular` for every file in a folder and those below it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            require_regular(os.path.join(parent, name))  # noqa: PTH118 - thousands of names


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> io.BufferedReader:
    """Open a regular file to be read; see `require_regular`."""
    require_regular(path, most)
    return open(path, "rb")  # noqa: PTH123


def read_limited(path: Path, most: int = MOST_TEXT_BYTES) -> bytes:
    """The bytes of a regular file that has at most so many; see `require_regular`."""
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it has grown, or has no size, as files of /proc
        raise _too_large(path, len(content), most)
    return content


def read_text(path: Path, most: int = MOST_TEXT_BYTES) -> str:
    """The text, UTF-8, of a regular file of at most so many bytes; see `require_regular`."""
    return read_limited(path, most).decode("utf-8")


def file_sha256(path: Path) -> bytes:
    """sha256 of the bytes of a regular file; see `require_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").digest()


def require_sound_archive(path: str | os.PathLike[str]) -> None:
    """Raise unless a regular file is no ZIP archive, or one whose contents are whole and fit.

    Neither torch.load nor NumPy compares the checksums, nor do they look how much a small archive
    becomes in memory.
    """
    require_regular(path)
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        require_room(sum(entry.file_size for entry in archive.infolist()))
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"other bytes than were written in {damaged}")


def require_room(size: int) -> None:
    """Raise `MemoryError` for contents of a file that are larger than the free memory."""
    free = free_memory()
    if size > free:
        raise MemoryError(f"{size / 1e9:.3g} GB, more than the {free / 1e9:.3g} GB of free memory")


def _too_large(path: str | os.PathLike[str], size: int, most: int) -> OSError:
    reason = f"{size / 1e6:.0f} MB, more than the {most / 1e6:.0f} MB that such a file may have"
    return OSError(errno.EFBIG, reason, os.fspath(path))


def require_file_names(
    ids: Sequence[str],
    *,
    remedy: str = "export to `layout=hdf5`, zarr or anndata, which keep ids as text",
) -> None:
    """Raise `InputError` for the first bag id that cannot be a file's name, or that names the same
    file as another one where a file system ignores case."""
    id_of: dict[str, str] = {}
    for bag_id in ids:
        fault = _name_fault(bag_id)
        folded = unicodedata.normalize("NFC", bag_id).casefold()
        if fault is None and folded in id_of:
            fault = f"a name that differs from {id_of[folded]!r} only by case"
        if fault is not None:
            raise InputError(
                f"bag {bag_id[:60]!r}",
                expected="an id that can be a file's name",
                got=fault,
                remedy=remedy,
            )
        id_of[folded] = bag_id


def _name_fault(bag_id: str) -> str | None:
    if not bag_id:
        return "an empty one"
    if "/" in bag_id or "\\" in bag_id:
        return "a slash in it"
    if bag_id.startswith("."):
        return "a dot at its start"
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in bag_id):
        return "a control character in it"
    if len((bag_id + LONGEST_SUFFIX).encode()) > MAX_NAME_BYTES:
        return f"{len(bag_id.encode())} bytes"
    return None


def is_storable(text: str) -> bool:
    """Whether a text can be kept in tables and in HDF5: UTF-8 without a null character.

    The names of files may be other bytes; Python gives those as lone surrogates.
    """
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def require_new(out: Path) -> None:
    """Raise `InputError` unless a folder is empty or does not exist yet.

    Unfinished files of a killed process do not count.
    """
    if out.exists() and (not out.is_dir() or not all(map(is_unfinished, out.iterdir()))):
        got = "one with files" if out.is_dir() else "a file"
        raise InputError(str(out), expected="a new folder", got=got, remedy="give another `out`")


def is_full(error: OSError) -> bool:
    """Whether an error is of a disk that is full, or of a limit to what may be written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unwritable(out: Path, error: OSError) -> InputError:
    """The error to raise where ``out`` cannot be made."""
    is_file = isinstance(error, FileExistsError | NotADirectoryError)
    return InputError(
        str(out),
        expected="a path in a folder that can be written",
        got="one in a file" if is_file else error.strerror or str(error),
        remedy="free space or correct the rights and repeat the command, or give another `out`",
    )


def write_csv(path: Path, head: Sequence[str], rows: Any) -> None:
    """Write a table atomically."""
    write_text(path, csv_text(head, rows))


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as text that the csv module reads back, whatever is in its cells."""
    text = io.StringIO(newline="")
    plain = csv.writer(text, lineterminator="\n")
    # Python quotes a cell for the line's end that it writes, not for the one that it also reads.
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in itertools.chain((head,), rows):
        cells = list(row)
        has_return = any("\r" in cell for cell in cells if isinstance(cell, str))
        (quoted if has_return else plain).writerow(cells)
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:  # of writing, which does not say where
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_tree(folder: Path) -> None:
    """Remove a folder as far as can be, also while threads of a library still write to it.

    Zarr writes in threads, of which one reports a disk's error while others go on for a moment.
    """
    for attempt in range(REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.02 * 2**attempt)


def is_unfinished(path: Path) -> bool:
    """Whether a file is the scratch file of a killed `write_bytes`, or the claim of a process."""
    return path.name.startswith(".") and path.name.endswith((".tmp", ".claim"))


def sync_folder(folder: Path) -> None:
    """Make a folder's names durable: a rename can be lost until then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """fsync a file, or every file and folder below a folder, contents first."""
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
