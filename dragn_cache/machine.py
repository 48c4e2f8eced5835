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
    """Bytes of ``8GB``, ``500MB`` or ``1000B``; None for ``auto``. A number alone says too little.

    Raises:
        SettingError: it is none of these.
    """
    if text == "auto":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]B?|B)", text.upper())
    if found is None or float(found[1]) == 0:
        raise SettingError(
            "memory",
            expected="auto or a size with its unit, as 8GB",
            got=repr(text),
            remedy="correct it",
        )
    return int(float(found[1]) * 1000 ** "BKMGT".index(found[2][0]))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still have: the machine's, and its control group's."""
    free = sys.maxsize
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+)", (root / "proc/meminfo").read_text())
        if found:
            free = int(found[1]) * 1024
    group = root / "sys/fs/cgroup"
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such group, or "max": no limit
            most, taken = (int((group / name).read_text()) for name in (limit, used))
            # Files that were read count as used, although they give way.
            statistics = (group / limit).with_name("memory.stat")
            text = statistics.read_text() if statistics.is_file() else ""
            found = re.search(rf"^{cached} (\d+)$", text, re.MULTILINE)
            free = min(free, most - taken + (int(found[1]) if found else 0))
    return max(0, free)


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, g++, clang++ or c++, whichever is there first; or None."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)
