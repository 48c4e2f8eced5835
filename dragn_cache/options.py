"""Settings that are declared once: type, bounds, default, help, and what they decide.

A class of settings is a frozen pydantic model whose fields are made by `setting`:

    class TrainConfig(Settings):
        lr: float = setting(3e-4, ge=0, le=1e3, help="Learning rate.", sweep=True)

From that one line come the check and its error, the option of the command line and its help, the
key that TOML files are read and written with, and what a run records.

- A constructor, `replace` and `from_table` check everything and raise an InputError, never
  pydantic's error. A `SettingError` names the setting as a Python caller knows it; no flag is
  spelled here.
- Types are strict: True is not 1, "3" is not 3. A whole number will do for a number. Lists become
  tuples, so that what TOML and JSON give equals what Python gave.
- TOML has no None. A None that is the default is left out; any other is written as the text
  ``none``, which is read as None wherever None is allowed and that text is not. In a free table,
  such as the options of a method, the text ``none`` is None.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Self,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
)

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from dragn_cache.errors import InputError, SettingError, UnknownNameError

MAX_SEED = 2**63 - 1  # torch takes no more than 64 bits, and TOML keeps 63
Kind = Literal["features", "numerics", "plan"]
"""Which of a store's digests a setting is part of."""

REQUIRED: Any = object()
"""The default of a setting that has none."""

NONE = "none"


# --- declaring ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """The arguments of `setting` that pydantic has no use for."""

    kind: Kind | None
    sweep: bool
    options_of: str | None
    expected: str | None
    check: Callable[[Any], object] | None
    flag: str | None
    metavar: str | None
    shown_default: str | None
    parse: Callable[[str], Any] | None
    text: Callable[[Any], str] | None


def setting(
    default: Any = REQUIRED,
    *,
    help: str,
    default_factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    kind: Kind | None = None,
    sweep: bool = False,
    options_of: str | None = None,
    expected: str | None = None,
    check: Callable[[Any], object] | None = None,
    flag: str | None = None,
    metavar: str | None = None,
    shown_default: str | None = None,
    parse: Callable[[str], Any] | None = None,
    text: Callable[[Any], str] | None = None,
) -> Any:
    """Declare a field of `Settings`.

    Args:
        help: one line, without the default.
        ge, gt, le, lt: bounds of a number. Where a number is one of several types, they are given
            as ``Annotated[float, Ge(0)]`` in the annotation.
        kind: the digest of a store that it is part of.
        sweep: whether a sweep may range over it.
        options_of: the setting whose choice these options belong to: they are joined one by one,
            and dropped when something else is chosen.
        expected: what it must be, in words; by default made from type and bounds.
        check: called with a value that is not None; raises an InputError.
        flag: name on the command line without dashes; by default the name with ``-`` for ``_``.
        metavar: what stands for the value in help.
        shown_default: the default in help, where the value itself says too little.
        parse: turns the command line's text into the value; by default made from the type.
        text: the inverse of ``parse``.
    """
    facts = _Facts(
        kind=kind,
        sweep=sweep,
        options_of=options_of,
        expected=expected,
        check=check,
        flag=flag,
        metavar=metavar,
        shown_default=shown_default,
        parse=parse,
        text=text,
    )
    known: dict[str, Any] = {"description": help, "json_schema_extra": {"facts": facts}}
    known |= {"ge": ge, "gt": gt, "le": le, "lt": lt}
    if default_factory is not None:
        return Field(default_factory=default_factory, **known)
    return Field(**known) if default is REQUIRED else Field(default, **known)


# Without field specifiers a type checker takes every field for one with a default: it knows only
# defaults that are given by keyword.
@dataclass_transform(kw_only_default=True, frozen_default=True)
class Settings(BaseModel, frozen=True):
    """Base of all classes of settings."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _input_error(type(self), values, error) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for declared in declarations(cls).values():
            declared.require_sound(cls)

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise _input_error(cls, obj if isinstance(obj, Mapping) else {}, error) from None

    @model_validator(mode="before")
    @classmethod
    def _normal_values(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = declarations(cls)
        return {
            name: known[name].normal(value) if name in known else value
            for name, value in values.items()
        }

    @model_validator(mode="after")
    def _checked(self) -> Self:
        # An InputError is no ValueError, so that pydantic lets it through as it is.
        for name, declared in declarations(type(self)).items():
            declared.require_checked(getattr(self, name))
        self.require_consistent()
        return self

    def require_consistent(self) -> None:
        """Raise an InputError for values that do not go together; a subclass says which."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked as a new one is."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def __replace__(self, **changes: Any) -> Self:
        return self.replace(**changes)

    if not TYPE_CHECKING:  # a type checker knows it from the decorator

        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(f"{type(self).__name__} is frozen; use replace({name}=…)")

    def to_dict(self) -> dict[str, Any]:
        """All values by name; of settings in settings as well."""
        values = {name: getattr(self, name) for name in declarations(type(self))}
        return {n: v.to_dict() if isinstance(v, Settings) else v for n, v in values.items()}

    def to_table(self) -> dict[str, Any]:
        """The values as TOML can hold them: lists for tuples, and no None."""
        table = {}
        for name, declared in declarations(type(self)).items():
            value = getattr(self, name)
            if value is not None or declared.default is not None:
                table[name] = _plain(value)
        return table

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> Self:
        """The inverse of `to_table`.

        Args:
            where: of the table, for errors: its file.
        """
        require_known(where, table, declarations(cls))
        try:
            return cls(**table)
        except InputError as error:
            raise error.at(f"{where}: {error.where}") from error


# --- what is declared --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Declared(_Facts):
    """A setting as its class declares it.

    Attributes:
        members: the types that it may have: more than one in a union, without None.
        choices: the allowed values; None unless all types are Literals.
        bounds: of the number that it is, or may be: ``{"ge": 0, "lt": 1}``.
        optional: whether None is allowed.
        default: `REQUIRED` where there is none.
        help: one line.

    The others are the arguments of `setting`.
    """

    name: str
    members: tuple[Any, ...]
    choices: tuple[Any, ...] | None
    bounds: Mapping[str, float]
    optional: bool
    default: Any
    help: str
    expected: str
    flag: str

    def normal(self, value: Any) -> Any:
        """A given value as it is kept: without lists, and with settings for tables of settings.

        `NONE` and None each stand for the other where only the other may be.

        Raises:
            SettingError: it is none of `choices`, or a setting in it cannot be used.
        """
        literals = _literals(self.members)
        if self.optional and _is_none(value) and str not in self.members and NONE not in literals:
            return None
        if value is None and not self.optional and NONE in literals:
            return NONE
        if value is not None and self.choices is not None:
            # Here and not later, because pydantic takes True for a Literal's 1.
            if not any(_same(value, choice) for choice in self.choices):
                raise self.error(value)
            return value
        inner = _settings_class(self.members)
        if inner is not None and isinstance(value, Mapping):
            return self._table(inner, value)
        if isinstance(value, list | tuple) and any(get_origin(m) is list for m in self.members):
            return [*value]
        return _frozen(value)

    def _table(self, cls: type[Settings], table: Mapping[str, Any]) -> Settings:
        require_known(self.name, table, declarations(cls))
        try:
            return cls(**table)
        except SettingError as error:
            raise SettingError(
                f"{self.name}.{error.where}",
                expected=error.expected,
                got=error.got,
                remedy=error.remedy,
            ) from error

    def require_checked(self, value: Any) -> None:
        """Raise a SettingError for a value that `check` does not allow."""
        if value is None or self.check is None:
            return
        try:
            self.check(value)
        except InputError as error:
            raise SettingError(
                self.name, expected=error.expected, got=error.got, remedy=error.remedy
            ) from error

    def error(self, value: Any) -> SettingError:
        """The error of a value that is not as `expected`."""
        remedy = "change it" if self.choices is None else "choose one of them"
        words = [choice for choice in self.choices or () if isinstance(choice, str)]
        if close := difflib.get_close_matches(str(value), words, n=1):
            remedy = f"did you mean {close[0]}? otherwise {remedy}"
        return SettingError(self.name, expected=self.expected, got=repr(value), remedy=remedy)

    def require_sound(self, cls: type) -> None:
        """Raise a TypeError for a declaration that cannot hold what it promises."""
        where = f"{cls.__name__}.{self.name}"
        mixed = len(self.members) > 1 and bool(_bounds(cls.model_fields[self.name].metadata))  # type: ignore[attr-defined]
        if mixed:
            raise TypeError(f"{where}: give the bounds of a union's number as Annotated")
        if self.optional and self.default is not None and str in self.members:
            raise TypeError(f"{where}: a text that may be None needs None as its default")

    @property
    def default_text(self) -> str:
        """The default as help shows it; empty where there is none to show."""
        if self.shown_default is not None:
            return self.shown_default
        if self.default is REQUIRED or self.default is None or self.default in ((), {}, ""):
            return ""
        return self.text(self.default) if self.text else value_text(self.default)


@functools.cache
def declarations(cls: type[Settings]) -> Mapping[str, Declared]:
    """The settings that a class declares, by name, in order."""
    return types.MappingProxyType(
        {name: _declared(cls, name, info) for name, info in cls.model_fields.items()}
    )


def value_text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(value_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _declared(cls: type[Settings], name: str, info: FieldInfo) -> Declared:
    extra = info.json_schema_extra
    if not isinstance(extra, dict) or "facts" not in extra:
        raise TypeError(f"{cls.__name__}.{name} is not declared by setting(…)")
    facts = cast(_Facts, extra["facts"])
    annotated = _members(info.annotation)
    members = tuple(m for m in annotated if m is not type(None))
    literal = all(get_origin(member) is Literal for member in members)
    bounds = _bounds(info.metadata)
    for member in members:
        bounds |= _bounds(getattr(member, "__metadata__", ()))
    own = {
        "expected": facts.expected or _expected(members, _bounds(info.metadata)),
        "flag": facts.flag or name.replace("_", "-"),
    }
    return Declared(
        name=name,
        members=members,
        choices=_literals(members) if literal and members else None,
        bounds=bounds,
        optional=type(None) in annotated or info.annotation is Any,
        default=REQUIRED if info.is_required() else info.get_default(call_default_factory=True),
        help=info.description or "",
        **(vars(facts) | own),
    )


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, flat; the type itself where it is none."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for argument in get_args(annotation) for m in _members(argument))
    return (annotation,)


def _literals(members: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(v for m in members if get_origin(m) is Literal for v in get_args(m))


def _same(value: Any, choice: Any) -> bool:
    """Whether a value is a choice; True is not 1, which pydantic takes for it."""
    return isinstance(value, bool) == isinstance(choice, bool) and bool(value == choice)


def _bounds(metadata: Sequence[Any]) -> dict[str, Any]:
    names: dict[type, str] = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
    return {names[type(m)]: getattr(m, names[type(m)]) for m in metadata if type(m) in names}


def _expected(members: Sequence[Any], bounds: Mapping[str, float]) -> str:
    """The allowed values in words."""
    words = [str(v) for v in _literals(members)]
    others = [_type_text(m, bounds) for m in members if get_origin(m) is not Literal]
    *first, last = [*others, *words] or ["nothing"]
    return f"{', '.join(first)} or {last}" if first else last


def _type_text(member: Any, bounds: Mapping[str, float]) -> str:
    origin, arguments = get_origin(member), get_args(member)
    if origin is Annotated:
        return _type_text(arguments[0], _bounds(arguments[1:]))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each {_expected(_members(arguments[0]), {})}"
    if origin is tuple:
        return f"{len(arguments)} values, each {_expected(_members(arguments[0]), {})}"
    if _settings_class([member]):
        return f"{member.__name__}, or a table of its settings"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return "a table of names and values"
    named = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    text = named.get(member, getattr(member, "__name__", str(member)))
    return f"{text} {_range_text(bounds)}" if bounds else text


def _range_text(bounds: Mapping[str, float]) -> str:
    text = {k: str(int(v)) if v == int(v) else str(v) for k, v in bounds.items()}
    if "ge" in text and ("le" in text or "lt" in text):
        return f"from {text['ge']} to {text['le'] if 'le' in text else 'below ' + text['lt']}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return " and ".join(f"{words[k]} {text[k]}" for k in words if k in text)


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value == NONE


def _settings_class(members: Sequence[Any]) -> type[Settings] | None:
    classes = (m for m in members if inspect.isclass(m) and issubclass(m, Settings))
    return next(classes, None)


def _frozen(value: Any) -> Any:
    """A copy in which lists are tuples and, in tables, the text `NONE` is None."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Mapping):
        return {k: None if _is_none(v) else _frozen(v) for k, v in value.items()}
    return value


def _plain(value: Any) -> Any:
    """A value as TOML holds it."""
    if isinstance(value, Settings):
        return value.to_table()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return NONE if value is None else value


# --- errors ------------------------------------------------------------------------------------


def require_known(
    where: str, names: Mapping[str, Any], known: Mapping[str, Any], noun: str = "setting"
) -> None:
    """Raise an UnknownNameError for the first name that is not known."""
    for name in names:
        if name not in known:
            remedy = None if known else "there are none: leave it out"
            raise UnknownNameError(noun, name, known, remedy=remedy).at(where)


def _input_error(
    cls: type[Settings], values: Mapping[str, Any], error: ValidationError
) -> InputError:
    """The error of the first thing that pydantic found; an unknown name comes before others."""
    known = declarations(cls)
    details = error.errors(include_url=False)
    detail = min(details, key=lambda d: d["type"] != "extra_forbidden")
    name = str(detail["loc"][0]) if detail["loc"] else ""
    if detail["type"] == "extra_forbidden":
        return cast(InputError, UnknownNameError("setting", name, known).at(cls.__name__))
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):  # of a validator
        got = repr(values[name]) if name in values else "these values"
        kind = SettingError if name else InputError
        return kind(name or cls.__name__, expected=str(cause), got=got, remedy="change it")
    if not name:
        return InputError(
            cls.__name__, expected="settings by name", got=repr(detail["input"]), remedy="name them"
        )
    declared = known[name]
    if name not in values and declared.default is REQUIRED:
        return SettingError(name, expected=declared.expected, got="none", remedy=f"give {name}=…")
    return declared.error(values.get(name, declared.default))
