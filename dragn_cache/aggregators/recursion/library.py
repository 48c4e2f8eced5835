"""The package's C++ sources, compiled once for this processor, kept and loaded.

Compiling takes a second or two; the result stays in the user's cache folder, under a name that
changes with the source, the compiler and the processor. Without a compiler PyTorch computes the
same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import stat
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from dragn_cache.machine import find_compiler

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi")


def cache_folder() -> Path:
    """The folder of compiled code; not an absolute path for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME")
    if not home:  # Path.home() raises where there is none
        home = os.path.join(os.path.expanduser("~"), ".cache")  # noqa: PTH111, PTH118
    return Path(home) / "dragn-cache" / "native"


@cache
def load_library(source: Path, *definitions: str) -> ctypes.CDLL | None:
    """Compile a source, unless that was done before, and load it.

    Args:
        definitions: macros, as ``NAME=value``.

    Returns:
        the library, or None without a compiler, and with a warning where it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    command = [compiler, *FLAGS, *(f"-D{text}" for text in definitions), str(source)]
    key = hashlib.sha256(source.read_bytes())
    for text in (*command[1:-1], _version(compiler), _processor()):
        key.update(text.encode() + b"\0")
    name = f"{source.stem}-{key.hexdigest()[:24]}.so"
    try:
        path = _compiled(command, name)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged, or compiled on another system
            path.unlink()
            return ctypes.CDLL(str(_compiled(command, name)))
    except (OSError, subprocess.CalledProcessError) as error:
        message = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{compiler} cannot compile {source.name}, PyTorch computes instead, several times "
            f"slower: {message.strip().splitlines()[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compiled(command: list[str], name: str) -> Path:
    """The library's file, if need be compiled: written beside and renamed, so that it is whole."""
    folder = cache_folder()
    if not _is_ours(folder):
        folder = Path(tempfile.mkdtemp(prefix="dragn-cache-"))
    if (folder / name).exists():
        return folder / name
    # A name of its own for each attempt: threads and containers share process numbers.
    handle, beside = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    os.close(handle)
    try:
        subprocess.run([*command, "-o", beside], check=True, capture_output=True, text=True)
        Path(beside).replace(folder / name)
    finally:
        Path(beside).unlink(missing_ok=True)
    return folder / name


def _is_ours(folder: Path) -> bool:
    """Whether the folder exists, or could be made, and nobody else can put code into it."""
    if not folder.is_absolute():
        return False
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return False
    private = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.getuid() and private and os.access(folder, os.W_OK)


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _processor() -> str:
    """The processor, on which -march=native depends: machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(dict.fromkeys(s for s in lines if s.startswith(fields)))


@cache
def threads(count: int, process: int) -> ThreadPoolExecutor:
    """A pool of threads for C++ code; one for each process, since a fork has no threads of it."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"native-{process}")
