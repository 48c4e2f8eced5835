"""Settings as options of a command: made from their declarations, and written as a command line.

`takes` gives a command the options of a class of settings. All of them are unset unless given, so
that what was not given may come from a recipe or a file: defaults < ``--recipe`` < ``--config`` <
options. An error of a setting says which of these gave it.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from dragn_cache.errors import DragnCacheError, InputError, SettingError
from dragn_cache.options import (
    NONE,
    Declared,
    Settings,
    declarations,
    merge,
    read_table,
    require_known,
    value_text,
)
from dragn_cache_cli import parsing

Command = Callable[..., None]
Values = Mapping[str, Any]

CONFIG, RECIPE = "config_file", "recipe"

shown_flags: ContextVar[Mapping[str, str]] = ContextVar("shown_flags")
"""The options of the settings that the running command takes, by name, for warnings."""


def takes(
    cls: type[Settings],
    *,
    as_: str = "config",
    leave_out: Iterable[str] = (),
    section: str | None = None,
    recipes: Callable[[str], Values] | None = None,
) -> Callable[[Command], Command]:
    """A command with an argument of settings as one that has their options.

    Args:
        as_: the command's argument that gets the settings.
        leave_out: settings without an option: those that the command sets itself.
        section: of a file with several, a run's ``config.toml``: the one that ``--config`` reads;
            None: no ``--config``.
        recipes: gives a recipe's values by its name; None: no ``--recipe``.
    """
    left_out = set(leave_out)
    shown = {name: d for name, d in declarations(cls).items() if name not in left_out}

    def decorate(command: Command) -> Command:
        own = _parameters(command)
        own.pop(as_)
        layers = {RECIPE: _recipe_option()} if recipes is not None else {}
        layers |= {CONFIG: _config_option(section)} if section is not None else {}
        options = {name: parameter(declared) for name, declared in shown.items()}

        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            texts = {name: arguments.pop(name) for name in options}
            recipe, file = arguments.pop(RECIPE, None), arguments.pop(CONFIG, None)
            given = {n: value_of(shown[n], t) for n, t in texts.items() if t is not None}
            below = []
            if recipe is not None and recipes is not None:
                below.append((f"recipe {recipe}", recipes(recipe)))
            if file is not None:
                table = read_table(file, section)
                _require_settings(cls, file, section, table)
                below.append((str(file), table))
            for where, values in below:
                require_known(where, values, declarations(cls))
            with _named_as_given(cls, given, below):
                config = cls(**merge(cls, *(values for _, values in below), given))
                command(**arguments, **{as_: config})

        parameters = [*own.values(), *layers.values(), *options.values()]
        # Typer reads both.
        run.__dict__["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


@contextmanager
def _named_as_given(
    cls: type[Settings], given: Values, below: Iterable[tuple[str, Values]]
) -> Iterator[None]:
    """Errors of settings name the option, the file or the recipe that gave the value."""
    flags = flags_of(cls)
    before = shown_flags.set({**shown_flags.get({}), **flags})
    try:
        yield
    except SettingError as error:
        name = error.where.split(".")[0]
        sources = [where for where, values in below if name in values and name not in given]
        if sources:
            raise spell(error.at(f"{sources[-1]}: {error.where}"), flags) from error
        raise spell(error, flags) from error
    except DragnCacheError as error:
        raise spell(error, flags) from error
    finally:
        shown_flags.reset(before)


def _require_settings(cls: type[Settings], file: Path, section: str | None, table: Values) -> None:
    """Raise an InputError for a file of other sections: a cross-validation's, a data set's."""
    others = [n for n, v in table.items() if isinstance(v, dict) and n not in declarations(cls)]
    if others:
        raise InputError(
            str(file),
            expected=f"settings alone, or in a section [{section}] as a run's config.toml has it",
            got=", ".join(f"[{name}]" for name in others),
            remedy="give a run's, or write the settings to a file of their own",
        )


def spell(
    error: DragnCacheError, flags: Mapping[str, str], *, others: bool = False
) -> DragnCacheError:
    """An error that names settings by their options.

    Args:
        flags: the option of each, for the setting that an error is of, and for those that its text
            has in backquotes.
        others: as of `spell_text`.
    """
    if isinstance(error, SettingError) and error.where in flags:
        error = error.at(flags[error.where])
    return error.reworded(functools.partial(spell_text, flags=flags, others=others))


def spell_text(text: str, flags: Mapping[str, str], *, others: bool = False) -> str:
    """A text that names settings by their options: `dtype=float32` becomes --dtype float32.

    Args:
        others: also write those with a value that are in no ``flags``, as of another command.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in flags and (value is None or not others):
            return match[0]
        name = flags.get(name, f"--{name.replace('_', '-')}")
        if value in (None, "True"):
            return name
        return f"--no-{name[2:]}" if value == "False" else f"{name} {value}"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", option, text)


def flags_of(cls: type[Settings]) -> dict[str, str]:
    """The options of a class of settings, by their names."""
    return {name: flag(declared) for name, declared in declarations(cls).items()}


def own_flags(command: Command) -> dict[str, str]:
    """The options of a command's own arguments, by their names."""
    flags = {}
    for name, own in _parameters(command).items():
        facts = [fact for fact in get_args(own.annotation) if isinstance(fact, OptionInfo)]
        # In an annotation Typer takes the first name for the default, and sorts that out later.
        names = [word for fact in facts for word in (fact.default, *(fact.param_decls or ()))]
        declared = [word for word in names if isinstance(word, str)]
        positional = any(isinstance(fact, ArgumentInfo) for fact in get_args(own.annotation))
        if not positional:
            flags[name] = (declared or [f"--{name.replace('_', '-')}"])[0].split("/")[0]
    return flags


def flag(declared: Declared) -> str:
    """The option of a setting."""
    return f"--{declared.flag}"


# --- a setting as a parameter ------------------------------------------------------------------


def parameter(declared: Declared) -> inspect.Parameter:
    """A setting as a parameter that Typer makes an option of; None unless it is given."""
    names = [flag(declared)]
    if _is_switch(declared):
        names = [f"{flag(declared)}/--no-{declared.flag}"]
    default = declared.default_text
    if _is_switch(declared) and default:
        default = declared.flag if declared.default else f"no-{declared.flag}"
    text = f"{declared.help} [{default}]" if default else declared.help
    option = typer.Option(*names, help=text, metavar=_metavar(declared), show_default=False)
    return inspect.Parameter(
        declared.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[_option_type(declared) | None, option],
    )


def value_of(declared: Declared, given: Any) -> Any:
    """The value of what Typer gives for an option; what it cannot be the settings refuse."""
    if declared.parse is not None:
        try:
            return declared.parse(given)
        except InputError as error:
            raise error.at(flag(declared)) from error
    if isinstance(given, list):
        return parsing.parse_options(given, flag(declared))
    if not isinstance(given, str):
        return given
    for member in declared.members:
        if get_origin(member) is tuple:
            items, pieces = get_args(member), parsing.parse_names(given) or ()
            kinds = items[:1] * len(pieces) if items[-1] is Ellipsis else items
            kinds += (str,) * (len(pieces) - len(kinds))
            return tuple(_typed(p, (k,)) for p, k in zip(pieces, kinds, strict=False))
    return _typed(given, (*declared.members, *([NoneType] if declared.optional else [])))


def words(cls: type[Settings], values: Values) -> list[str]:
    """The words of a command line that gives these settings; None is not given."""
    line: list[str] = []
    for name, value in values.items():
        declared = declarations(cls)[name]
        if value is None:
            continue
        if declared.text is not None:
            line += [flag(declared), declared.text(value)]
        elif _is_switch(declared):
            line.append(flag(declared) if value else f"--no-{declared.flag}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                line += [flag(declared), f"{key}={value_text(item)}"]
        else:
            line += [flag(declared), value_text(value)]
    return line


def _metavar(declared: Declared) -> str | None:
    """The word for the value in help; None where Typer's own says as much."""
    if declared.metavar is not None or declared.parse is not None:
        return declared.metavar
    kind = _option_type(declared)
    if kind == list[str]:
        return "NAME=VALUE"
    words = [get_args(m)[0] if get_origin(m) is Annotated else m for m in declared.members]
    if kind is not str or words == [str] or any(get_origin(w) is tuple for w in words):
        return None
    texts = [[map(value_text, get_args(w))] if get_origin(w) is Literal else [w] for w in words]
    return "|".join(t.__name__.upper() if inspect.isclass(t) else "|".join(t) for (t,) in texts)


def _is_switch(declared: Declared) -> bool:
    return declared.members == (bool,) and declared.parse is None


def _option_type(declared: Declared) -> Any:
    """The type that Typer is told: its own checks and words in help are used where they fit."""
    if declared.parse is not None:
        return str
    if len(declared.members) == 1:
        (member,) = declared.members
        if member in (bool, int, float, str):
            return member
        if get_origin(member) is Literal and all(isinstance(v, str) for v in get_args(member)):
            return member
        origin = get_origin(member)
        if inspect.isclass(origin) and issubclass(origin, Mapping):
            return list[str]
        if inspect.isclass(member) and issubclass(member, Settings):
            raise TypeError(f"{declared.name}: settings in settings have no option; leave it out")
    return str


def _typed(text: str, members: Iterable[Any]) -> Any:
    """A text as the first of these types that it can be; else it stays, for the settings to judge.

    None comes last: where ``none`` is a word of its own, it is that word.
    """
    kinds = [get_args(m)[0] if get_origin(m) is Annotated else m for m in members]
    for choice in (v for kind in kinds if get_origin(kind) is Literal for v in get_args(kind)):
        if text == value_text(choice):
            return choice
    if NoneType in kinds and text == NONE and str not in kinds:
        return None
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    if int in kinds and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if float in kinds and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    return text


def _config_option(section: str) -> inspect.Parameter:
    text = f"TOML of settings, perhaps as its [{section}], for what is not given."
    option = typer.Option("--config", metavar="FILE", help=text)
    return _unset(CONFIG, Annotated[Path | None, option])


def _recipe_option() -> inspect.Parameter:
    option = typer.Option(help="Published settings, for what is not given; see recipes.")
    return _unset(RECIPE, Annotated[str | None, option])


def _unset(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A function's parameters by name, their annotations evaluated."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    return {n: p.replace(annotation=hints.get(n, Any), kind=kind) for n, p in parameters.items()}
