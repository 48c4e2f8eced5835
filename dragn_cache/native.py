"""The package's C++ sources, compiled once for this machine's own vectors, kept and loaded.

Compiling takes a second or two; the result stays in the user's cache folder, under a name that
changes with the source, the compiler and the processor. Nothing needs it: where there is no
compiler, PyTorch computes the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi")


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, g++, clang++ or c++, whichever is there first; or None."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled code is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "dragn-cache" / "native"


@cache
def load_library(source: Path, *definitions: str) -> ctypes.CDLL | None:
    """Compile a source, unless that was done before, and load it.

    Args:
        definitions: macros, as ``NAME=value``.

    Returns:
        the library, or None where there is no compiler, or none that can compile it (which is
        said in a warning).
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
        return ctypes.CDLL(str(_compiled(command, name)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{compiler} cannot compile {source.name}, PyTorch computes instead, several times "
            f"slower: {said.strip().splitlines()[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compiled(command: list[str], name: str) -> Path:
    """The library's file, written beside and renamed, so that one that exists is whole."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if (folder / name).exists():
        return folder / name
    if not writable:
        folder = Path(tempfile.mkdtemp(prefix="dragn-cache-"))
    beside = folder / f".{name}.{os.getpid()}"
    subprocess.run([*command, "-o", str(beside)], check=True, capture_output=True, text=True)
    beside.replace(folder / name)
    return folder / name


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(dict.fromkeys(s for s in lines if s.startswith(wanted)))


@cache
def threads(count: int, process: int) -> ThreadPoolExecutor:
    """A pool of threads for C++ code; one for each process, because a fork leaves them behind."""
    return ThreadPoolExecutor(count, thread_name_prefix=f"native-{process}")
