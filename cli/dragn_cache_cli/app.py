"""The ``dragn-cache`` program: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

import dragn_cache
from dragn_cache.errors import DragnCacheError
from dragn_cache_cli.commands import (
    aggregators,
    backbones,
    check,
    crossval,
    demo,
    doctor,
    evaluate,
    explain,
    export_features,
    extract,
    import_features,
    info,
    predict,
    recipes,
    simulate,
    taps,
    train_agg,
    verify,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo.demo,
    "check": check.check,
    "extract": extract.extract,
    "train-agg": train_agg.train_agg,
    "crossval": crossval.crossval,
    "evaluate": evaluate.evaluate,
    "predict": predict.predict,
    "explain": explain.explain,
    "import": import_features.import_features,
    "export": export_features.export_features,
    "info": info.info,
    "verify": verify.verify,
    "doctor": doctor.doctor,
    "backbones": backbones.backbones,
    "taps": taps.taps,
    "aggregators": aggregators.aggregators,
    "recipes": recipes.recipes,
    "simulate": simulate.simulate,
}
# Where an aggregator may be a class of one's own, by its name or by a run that was trained with it.
NAME_CLASSES = ("train-agg", "crossval", "evaluate", "predict", "explain", "aggregators")

app = typer.Typer(
    help="Run a frozen CNN once over bags of images, keep its features, and train "
    "multiple-instance aggregators on them in seconds.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors end in one line on stderr and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except DragnCacheError as error:
            raise fail(str(error)) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted: run the same command again to go on", err=True)
            raise typer.Exit(130) from error
        except BrokenPipeError as error:
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - the reader has gone
            raise typer.Exit(0) from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise fail(f"{error.filename or 'system'}: {reason}; correct it and retry") from error
        except Exception as error:
            if os.environ.get("DRAGN_CACHE_DEBUG"):
                raise
            place = users_code(error)
            text = f"{place or 'internal'}: {type(error).__name__}: {error}"
            wish = "correct" if place else "please report"
            hint = f"{wish} it with the traceback that DRAGN_CACHE_DEBUG=1 shows"
            raise fail(f"{' '.join(text.split())}; {hint}") from error

    return run


def users_code(error: Exception) -> str:
    """The file and line where an error left code of the user's, an own aggregator say; or ""."""
    ours = [Path(__file__).parent, Path(dragn_cache.__file__).parent, Path(os.__file__).parent]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        installed = {"site-packages", "dist-packages"} & set(file.parts)
        if file.suffix == ".py" and not installed and not any(map(file.is_relative_to, ours)):
            return f"{file}:{frame.lineno}"
    return ""


def fail(text: str) -> typer.Exit:
    """Print an error and give the exit to raise."""
    typer.secho(f"error: {text}", fg="red", err=True)
    return typer.Exit(2)


for name, function in COMMANDS.items():
    app.command(name)(guarded(function))


def _version(wanted: bool) -> None:
    if wanted:
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
        _find_own_classes()


def _find_own_classes() -> None:
    """Let modules in the working directory be imported, after all others."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)


def _terminated(number: int, frame: FrameType | None) -> None:
    typer.echo("terminated: run the same command again to go on", err=True)
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the program."""
    # Threads that spin while they wait lose most of their time on a machine that others use too
    # (docs/decisions/0006). It must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminated)
    app()
