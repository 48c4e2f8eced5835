"""The ``dragn-cache`` program: its commands, and the one place where errors become exit codes.

Exit code 0: done; 1: done, with faults that the command's help names; 2: an error, in one line on
stderr, or standard output that cannot be written (a full disk); 130: interrupted; 141: the reader
of standard output has gone, as in ``info s | head -1``, and nothing more is said; 143: terminated.
Closed standard streams count as /dev/null.
"""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from dragn_cache.errors import (
    DragnCacheError,
    InputError,
    OutOfMemoryError,
    is_out_of_memory,
)
from dragn_cache.files import is_storable
from dragn_cache.texts import one_line, shown
from dragn_cache_cli.own_classes import find_own_classes
from dragn_cache_cli.quiet import DEBUG, is_users, quiet_libraries

# name → module of this package, with a function of its name, and the first line of its help. A
# module is imported when its command is called: that halves the time of --help.
COMMANDS = {
    "demo": (
        "demo",
        "Simulate images, check them, extract features, train L3Agg, mean and max, and compare.",
    ),
    "check": (
        "check",
        "Join a data set's tables with its images and list every fault with file and line.",
    ),
    "extract": (
        "extract",
        "Run a frozen backbone over every crop of every bag and store its features.",
    ),
    "train-agg": (
        "train_agg",
        "Train an aggregator on a store; validation chooses the epoch, test reports.",
    ),
    "crossval": (
        "crossval",
        "Train methods on every fold of several divisions, and compare them.",
    ),
    "evaluate": (
        "evaluate",
        "Score a run, with intervals, a table of labels and a reliability diagram.",
    ),
    "predict": ("predict", "Apply a trained run to a store's bags; with labels, score them."),
    "explain": (
        "explain",
        "Score every instance: by attention, by its likeness to the bag, or by leaving it out.",
    ),
    "import": ("import_features", "Make a store of features that another tool has computed."),
    "export": ("export_features", "Write a store's features as another tool reads them."),
    "info": ("info", "Show a store's taps, size, completeness and provenance."),
    "verify": (
        "verify",
        "Compare a store's bags, or a run's files, with their digests; name the damaged ones.",
    ),
    "doctor": (
        "doctor",
        "Show what this machine has and, for a data set, what an extraction here would take.",
    ),
    "backbones": ("backbones", "List the backbones and the taps that they store by default."),
    "taps": ("taps", "Show every tap of a backbone: its shape and its bytes per instance in fp16."),
    "aggregators": (
        "aggregators",
        "List the methods: the tap they are meant for, whether order matters, whether they attend.",
    ),
    "recipes": (
        "recipes",
        "List the recipes for train-agg and crossval --recipe: published settings and their "
        "sources.",
    ),
    "simulate": ("simulate", "Write a simulated fluorescence data set: PNG files and a manifest."),
}
# Where an aggregator may be a class of one's own by its name. Commands that apply a run look in the
# working directory only for the class that they are told to allow.
NAME_CLASSES = ("train-agg", "crossval", "aggregators")

PIPE_CLOSED = 128 + 13  # as shells report a program that SIGPIPE ended

LOOKS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
}


def load_command(name: str) -> Callable[..., None]:
    """The function of a command."""
    module, _ = COMMANDS[name]
    command: Callable[..., None] = getattr(
        import_module(f"dragn_cache_cli.commands.{module}"), module
    )
    return command


class Commands(TyperGroup):
    """A group whose commands are only names and lines of help until one of them is called."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _escaped_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _escaped_usage():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and command.name in COMMANDS:
            alone = typer.Typer(**LOOKS)
            alone.command(command.name)(guarded(load_command(command.name)))
            command = typer.main.get_command(alone)
        return name, command, rest


@contextmanager
def _escaped_usage() -> Iterator[None]:
    """Escape what does not show in Typer's errors, which repeat words of the command line."""
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if hasattr(error, "format_message") and isinstance(message, str):
            vars(error)["message"] = "\n".join(map(shown, message.split("\n")))
        raise


app = typer.Typer(
    help="Run a frozen CNN once over bags of images, keep its features, and train "
    "multiple-instance aggregators on them in seconds.",
    cls=Commands,
    no_args_is_help=True,
    **LOOKS,
)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors end in one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            _require_utf8(kwargs)
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except DragnCacheError as error:
            from dragn_cache_cli.options import own_flags, spell

            raise fail(str(spell(error, own_flags(command), others=True))) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted: run the same command again to go on", err=True)
            raise typer.Exit(130) from error
        except BrokenPipeError:
            raise  # the reader of stdout has gone: see `main`
        except Exception as error:
            if is_out_of_memory(error):
                raise fail(str(OutOfMemoryError(error))) from error
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                text = f"{error.filename or 'system'}: {reason}; correct it and retry"
                raise fail(text) from error
            if os.environ.get(DEBUG):
                raise
            place = users_code(error)
            text = f"{place or 'internal'}: {type(error).__name__}: {error}"
            wish = "correct" if place else "please report"
            hint = f"{wish} it with the traceback that DRAGN_CACHE_DEBUG=1 shows"
            raise fail(f"{one_line(text)}; {hint}") from error

    return run


def _require_utf8(arguments: Mapping[str, object]) -> None:
    """Raise `InputError` for a file name that could not be written into a table or a record."""
    for value in arguments.values():
        if isinstance(value, str | Path) and not is_storable(str(value)):
            raise InputError(
                ascii(str(value)),
                expected="a name in UTF-8",
                got="other bytes",
                remedy="rename the file or folder",
            )


def users_code(error: Exception) -> str:
    """The file and line where an error left code of the user's, an own aggregator say; or ""."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(Path(frame.filename)):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def fail(text: str) -> typer.Exit:
    """Print an error and give the exit to raise."""
    typer.secho(f"error: {shown(text)}", fg="red", err=True)
    return typer.Exit(2)


def _placeholder() -> None:
    """Stand where `Commands` puts the command."""


for command_name, (_, line) in COMMANDS.items():
    app.command(command_name, help=line)(_placeholder)


def _version(asked: bool) -> None:
    if asked:
        from dragn_cache import __version__

        typer.echo(f"dragn-cache {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options that come before the command."""
    if context.invoked_subcommand in NAME_CLASSES:
        find_own_classes()


def _terminated(number: int, frame: FrameType | None) -> None:
    typer.echo("terminated: run the same command again to go on", err=True)
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the program."""
    # Threads that spin while they wait lose most of their time on a machine that others use too
    # (docs/decisions/0006). It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminated)
    _open_streams()
    quiet_libraries()
    try:
        app()
    except SystemExit as end:
        # rich and typer end with 1 where the reader of stdout has gone, as in `info … | head -1`.
        if any(isinstance(error, BrokenPipeError) for error in _chain(end)):
            _leave(PIPE_CLOSED)
        if end.code:
            raise
        _leave(0)
    except OSError as error:  # of printing help, or an error where stderr is full
        with suppress(OSError):
            fail(f"standard output: {error.strerror or error}; correct it and retry")
        _leave(2)


def _open_streams() -> None:
    """Make the standard streams fit for what is printed.

    A closed one is opened on nothing: else the next file that is opened gets its number, and what
    is printed goes into that file. Characters that a stream's encoding lacks are escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - for the process
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those during whose handling it came."""
    while error is not None:
        yield error
        error = error.__context__


def _leave(code: int) -> NoReturn:
    """Exit, and say nothing where the rest of stdout cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 2
    raise SystemExit(code)
