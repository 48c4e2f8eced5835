"""Every error that this package raises on purpose.

    DragnCacheError             one line: where, expected, got, what to do
    ├── InputError              something the user gave: a file, a value, an option
    │   ├── SettingError        the value of a setting, which `where` names as Python does: lr
    │   ├── ManifestError       a manifest's tables or its dataset.toml
    │   ├── ImageError          an image that cannot be used
    │   └── UnknownNameError    a name that is not in a registry; offers the nearest ones
    ├── OutOfMemoryError        more memory is needed than there is
    ├── WeightsError            weights that cannot be found, read or fitted to their network
    └── StoreError              a feature store that cannot be opened, written or trusted
        ├── StoreMismatchError  a store, checkpoint or run of other settings
        └── DamagedPartError    a part whose bytes are not what was written

The command line turns any of them into one line on stderr and exit code 2. Where bytes of others
are read, `foreign` makes one of them of whatever the parser raises.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dragn_cache.texts import difference, one_line, twin


class DragnCacheError(Exception):
    """Base of all errors. Its text is one line that says where, expected, got and what to do.

    ``expected`` and ``remedy`` name a setting in backquotes, as in "use `dtype=float32`"; the
    command line replaces it by its option.
    """

    def __init__(self, where: str, *, expected: str, got: str, remedy: str) -> None:
        self.where, self.expected, self.got, self.remedy = where, expected, got, remedy
        super().__init__(where, expected, got, remedy)

    def __str__(self) -> str:
        return one_line(f"{self.where}: expected {self.expected}, got {self.got}; {self.remedy}")

    def at(self, where: str) -> DragnCacheError:
        """The same error at another place: a file's key, a command line's option."""
        return _rebuild(type(self), where, self.expected, self.got, self.remedy)

    def reworded(self, change: Callable[[str], str]) -> DragnCacheError:
        """The same error with other words for what is expected and what to do."""
        words = change(self.expected), self.got, change(self.remedy)
        return _rebuild(type(self), self.where, *words)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments would be lost when a worker process sends the error back.
        return (_rebuild, (type(self), self.where, self.expected, self.got, self.remedy))


def _rebuild(
    cls: type[DragnCacheError], where: str, expected: str, got: str, remedy: str
) -> DragnCacheError:
    error = cls.__new__(cls)
    DragnCacheError.__init__(error, where, expected=expected, got=got, remedy=remedy)
    return error


class InputError(DragnCacheError):
    """A file, value or option of the user cannot be used."""


class SettingError(InputError):
    """A setting has a value that cannot be used.

    ``where`` is the setting's name alone, as a Python caller gives it. Code that knows where it was
    set (an option of the command line, a file) adds that by `at`.
    """

    def at(self, where: str) -> InputError:
        return InputError(where, expected=self.expected, got=self.got, remedy=self.remedy)


class ManifestError(InputError):
    """A manifest's tables or its dataset.toml are wrong."""


class ImageError(InputError):
    """An image is missing, unreadable, or smaller than a box in it."""


class UnknownNameError(InputError):
    """A name is in no registry.

    Args:
        kind: the kind of name, for example ``"backbone"``.
        name: the unknown name.
        known: all names of that kind.
        remedy: what to do; by default the list of names if it is short.
    """

    def __init__(
        self, kind: str, name: str, known: Iterable[str], *, remedy: str | None = None
    ) -> None:
        names = sorted(known)
        nearest = likely(name, names)
        if remedy is None:
            listed = ", ".join(names) if len(names) <= 20 else ""
            remedy = f"choose one of: {listed}" if listed else "correct it"
        if nearest:
            remedy = f"did you mean {nearest}? otherwise {remedy}"
        super().__init__(kind, expected=f"a known {kind}", got=repr(name), remedy=remedy)


def likely(name: str, known: Iterable[str]) -> str:
    """The name that was probably meant by an unknown one, or several; empty if none is near.

    One that only looks the same is given with what tells the two apart.
    """
    names = list(known)
    alike = twin(name, names)
    if alike is not None:
        return f"{alike!r} (they differ by {difference(name, alike)})"
    lowered = {n.lower(): n for n in names}
    close = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)
    return ", ".join(lowered[c] for c in close)


class WeightsError(DragnCacheError):
    """Weights cannot be found, read, or fitted to their network."""


class StoreError(DragnCacheError):
    """A feature store cannot be opened, written or trusted."""


class StoreMismatchError(StoreError):
    """A store, checkpoint or run was made with other settings than those asked for."""


class DamagedPartError(StoreError):
    """A part of a store holds other bytes than those that were written."""


LOCKED = "unable to lock file"
"""The words of HDF5 where another program has locked a file, or where it cannot be locked."""


@contextmanager
def foreign(
    where: str | Path,
    *,
    expected: str,
    remedy: str,
    kind: type[DragnCacheError] = InputError,
) -> Iterator[None]:
    """Turn every error of a parser of others' bytes into one of ours that names the file.

    On damaged bytes a parser raises nearly anything, an IndexError or a RecursionError too: a list
    of its errors would never be whole. Errors of ours pass, for they name their place already.
    """
    try:
        yield
    except DragnCacheError:
        raise
    except Exception as error:
        if LOCKED in str(error):
            raise kind(
                str(where),
                expected="a file that no other program writes",
                got=f"a lock on it ({reason(error)})",
                remedy="let that program finish; where the file system refuses all locks, set "
                "HDF5_USE_FILE_LOCKING=FALSE to read without one",
            ) from error
        raise kind(
            str(where), expected=expected, got=reason(error, str(where)), remedy=remedy
        ) from error


def reason(error: Exception, where: str = "") -> str:
    """The reason that an error of a library or of Python gives, in one line; ``where`` is known."""
    if isinstance(error, RecursionError):
        return "values nested too deeply to be read"
    if is_out_of_memory(error):
        detail = f" ({str(error)[:100]})" if str(error) else ""
        return f"contents that need more memory than there is{detail}"
    buried = re.search(r"error message = '([^']+)'", str(error))
    if buried:  # HDF5 has the system's own words in a long line of its own
        return buried[1]
    if isinstance(error, OSError) and error.strerror:
        other = error.filename is not None and str(error.filename) != where
        return f"{error.strerror}: {error.filename}" if other else error.strerror
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = f"nothing named {lines[0]}" if isinstance(error, KeyError) else lines[0]
    return text if len(text) <= 300 else f"{text[:299]}…"


# The words of libraries that raise other errors than MemoryError where memory is short.
NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
    "Unable to allocate",
    "memory allocation failed",
    "can't start new thread",
    "unable to mmap",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, Python's or a library's."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(words in str(error) for words in NO_MEMORY)


class OutOfMemoryError(DragnCacheError):
    """More memory is needed than there is.

    Args:
        error: of Python or of a library.
    """

    def __init__(self, error: BaseException) -> None:
        text = " ".join(str(error).split())
        super().__init__(
            "memory",
            expected="as much as this needs",
            got=(text if len(text) <= 160 else f"{text[:159]}…") or "less",
            remedy="give it more, or smaller batches, fewer jobs or workers, smaller images, or "
            "bags of fewer instances",
        )
