"""Cores, memory and compiler of this machine."""

from __future__ import annotations

import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from dragn_cache.errors import SettingError


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Decoding processes: one for each core, at most 16."""
    return min(16, usable_cores())


def parse_memory(text: str) -> int | None:
    """Bytes of ``8GB``, ``500MB`` or ``1000B``; None for ``auto``. A number needs its unit.

    Raises:
        SettingError: any other text.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]B?|B)", text.upper())
    if match is None or float(match[1]) == 0:
        raise SettingError(
            "memory",
            expected="auto or a size with its unit, as 8GB",
            got=repr(text),
            remedy="correct it",
        )
    return int(float(match[1]) * 1000 ** "BKMGT".index(match[2][0]))


def free_memory(root: Path = Path("/")) -> int:
    """Free bytes for this process: those of the machine, or of its control group if fewer."""
    free = sys.maxsize
    with suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+)", (root / "proc/meminfo").read_text())
        if match:
            free = int(match[1]) * 1024
    group = root / "sys/fs/cgroup"
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such group, or "max": no limit
            limit_bytes, used_bytes = (int((group / name).read_text()) for name in (limit, used))
            # Cached files count as used, but the kernel drops them when memory is needed.
            statistics = (group / limit).with_name("memory.stat")
            text = statistics.read_text() if statistics.is_file() else ""
            match = re.search(rf"^{cached} (\d+)$", text, re.MULTILINE)
            cached_bytes = int(match[1]) if match else 0
            free = min(free, limit_bytes - used_bytes + cached_bytes)
    return max(0, min(free, _free_addresses(root)))


def _free_addresses(root: Path) -> int:
    """Bytes that this process may still map, or write to, by its limits (``ulimit -v``, ``-d``)."""
    free = sys.maxsize
    if sys.platform == "win32":
        return free
    import resource

    with suppress(OSError):
        status = (root / "proc/self/status").read_text()
        for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            most = resource.getrlimit(limit)[0]
            match = re.search(rf"^{used}:\s+(\d+)", status, re.MULTILINE)
            if most != resource.RLIM_INFINITY and match:
                free = min(free, most - int(match[1]) * 1024)
    return free


def find_compiler() -> str | None:
    """Path of the C++ compiler: the first of $CXX, g++, clang++ and c++ that exists, or None."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)
