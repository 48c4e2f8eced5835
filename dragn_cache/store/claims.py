"""Claims: which process is working on what, so that several can share one store.

A claim is a file that is created exclusively and holds host, process, its start time and a token.
Its holder renews it (its time of modification) every `RENEW_SECONDS`. On the same host the process
number and the start time decide whether the holder lives (numbers are used again); a claim of
another host expires when it was not renewed for `EXPIRE_SECONDS`, by the clock of the file system:
those of hosts differ, and a time far in the future is no holder's either. Claims only save work: a
process that loses a race has computed the same bytes and discards them, so a wrong decision about a
holder never costs data.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dragn_cache.files import read_limited
from dragn_cache.types import Say

RENEW_SECONDS = 10.0
EXPIRE_SECONDS = 120.0
SILENT_SECONDS = 10.0  # of waiting, before a line says whom for
SUFFIX = ".claim"
OPEN_TOKENS: set[str] = set()
"""Tokens of this process's `Claims` that are not closed. A claim file that could not be removed
would otherwise count as held for as long as this process lives."""


class Claims:
    """The claims that one process holds in one folder; a thread renews them until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = uuid.uuid4().hex[:16]
        OPEN_TOKENS.add(self.token)
        self._names: set[str] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._renewer: threading.Thread | None = None

    def path(self, name: str) -> Path:
        return self.folder / f".{name}{SUFFIX}"

    def holds(self, name: str) -> bool:
        return name in self._names

    def acquire(self, name: str) -> bool:
        """Claim a name; False while another living process holds it."""
        with _guarded(self.folder):
            if not self._create(self.path(name)):
                return False
        with self._lock:
            self._names.add(name)
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew, daemon=True)
                self._renewer.start()
        return True

    def _create(self, path: Path) -> bool:
        if path.exists():
            if is_alive(path):
                return False
            path.unlink(missing_ok=True)
        content = json.dumps({**myself(), "token": self.token}).encode()
        try:
            if not _link_new(path, content):
                _write_new(path, content)
        except FileExistsError:
            return False
        return True

    def wait(self, name: str, say: Say) -> None:
        """Claim a name, as soon as nobody else holds it.

        Args:
            say: called once, after `SILENT_SECONDS`, with whom the wait is for and how to end it.
        """
        started_waiting, said = time.monotonic(), False
        while not self.acquire(name):
            if not said and time.monotonic() - started_waiting > SILENT_SECONDS:
                holder = describe_holder(self.path(name))
                if holder:
                    say(f"waiting for {name}: {how_to_end(holder, self.path(name))}")
                    said = True
            time.sleep(0.02)

    def release(self, name: str) -> None:
        """Give a claim up, unless another process has taken it over."""
        with self._lock:
            self._names.discard(name)
        path = self.path(name)
        with _guarded(self.folder):
            if (read_claim(path) or {}).get("token") == self.token:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give up all claims."""
        OPEN_TOKENS.discard(self.token)
        self._ended.set()
        if self._renewer is not None:
            self._renewer.join()
        for name in list(self._names):
            self.release(name)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with self._lock:
                for name in self._names:
                    path = self.path(name)
                    # Another process may have taken it over while this one was suspended.
                    if (read_claim(path) or {}).get("token") == self.token:
                        with suppress(OSError):  # the next write reports the disk's error
                            os.utime(path)


def _link_new(path: Path, content: bytes) -> bool:
    """Make a file with its content in one step; False where the file system cannot.

    A process that is killed between two steps would leave a claim without or with half of its
    content, which does not say who it was, and counts as held until it expires.
    """
    try:
        descriptor = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE, 0o666)
    except (AttributeError, OSError):  # not Linux, or a network file system
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        try:
            # With a folder's descriptor Python calls linkat, which follows the link in /proc.
            own = f"/proc/self/fd/{descriptor}"
            os.link(own, path, src_dir_fd=descriptor, follow_symlinks=True)
        except FileExistsError:
            raise
        except OSError:
            return False
    return True


def _write_new(path: Path, content: bytes) -> None:
    """Make a file, then write its content."""
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except OSError:
            path.unlink(missing_ok=True)
            raise


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Lock a folder, so that reading a claim and changing it is one step for this host's processes.

    Where folders cannot be locked (some network file systems) the exclusive creation still works;
    only the removal of a dead holder's claim is then open to a race.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def living_tokens(folder: Path) -> set[str]:
    """Tokens of all claims whose holders live; removes the claims of the dead."""
    tokens = set()
    with _guarded(folder):
        for path in folder.glob(f".*{SUFFIX}"):
            if is_alive(path):
                tokens.add(str((read_claim(path) or {}).get("token")))
            else:
                path.unlink(missing_ok=True)
    return tokens


def is_alive(path: Path) -> bool:
    """Whether the holder of a claim lives (False if there is no such claim)."""
    claim = read_claim(path)
    if claim is None:
        return False
    if claim.get("host") == host():
        pid = claim.get("pid")
        if pid == os.getpid() and claim.get("token") not in OPEN_TOKENS:
            return False
        # A process that has ended has no start time; another one of its number has another.
        return isinstance(pid, int) and claim.get("start") == started(pid) is not None
    try:
        return abs(_seconds_since_renewal(path)) < EXPIRE_SECONDS
    except FileNotFoundError:
        return False


def describe_holder(path: Path) -> str:
    """Who holds a claim and since when it has not been renewed; empty if nobody does."""
    claim = read_claim(path)
    with suppress(FileNotFoundError):
        if claim is not None:
            who = f"process {claim.get('pid', 'unknown')} on {claim.get('host', 'unknown host')}"
            return f"{who}, renewed {max(0.0, _seconds_since_renewal(path)):.0f} s ago"
    return ""


def how_to_end(holder: str, path: Path) -> str:
    """A holder as `describe_holder` gives it, and what to do if it has ended."""
    return f"{holder}; if that has ended, remove {path}"


def _seconds_since_renewal(path: Path) -> float:
    return _file_system_time(path.parent) - path.stat().st_mtime


def _file_system_time(folder: Path) -> float:
    """Now by the clock that dates a folder's files, or by this host's if none can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def read_claim(path: Path) -> dict[str, Any] | None:
    """A claim's content; empty while it is being written, None if there is none."""
    try:
        claim = json.loads(read_limited(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return claim if isinstance(claim, dict) else {}


def myself() -> dict[str, Any]:
    """Host, process and its start time."""
    return {"host": host(), "pid": os.getpid(), "start": started(os.getpid())}


def host() -> str:
    """This host, and the namespace in which its process numbers count (containers share names)."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def started(pid: int) -> str | None:
    """Start time of a process of this host, as the kernel writes it; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _started_without_proc(pid)
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _started_without_proc(pid: int) -> str | None:
    """A constant for a process that lives: without /proc its start time is not known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
