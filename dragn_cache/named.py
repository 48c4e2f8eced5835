"""Things chosen by name, a loss or an aggregator, and their options.

A registry maps names to classes of settings, or to `Registered` where the thing itself is imported
only when it is asked for. Errors name the thing: ``loss focal, option gamma: …``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, create_model
from pydantic.errors import PydanticSchemaGenerationError

from dragn_cache.errors import SettingError, UnknownNameError
from dragn_cache.options import REQUIRED, Settings, declarations, require_known, setting

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A class in a registry, as far as it is known before it is imported.

    Attributes:
        target: ``package.module:Class``.
        options: its options.
        text: one line on what it does.
    """

    target: str
    options: type[Settings]
    text: str

    def load(self) -> Any:
        """The class."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


def choose(kind: str, registry: Mapping[str, type[S]], name: str, options: Mapping[str, Any]) -> S:
    """Make what a registry holds under a name.

    Args:
        kind: what it is, for errors: ``"loss"``.

    Raises:
        UnknownNameError: the registry does not have the name.
        InputError: an option that it does not have, lacks, or does not allow to have this value.
    """
    if name not in registry:
        raise UnknownNameError(kind, name, registry)
    return make(f"{kind} {name}", registry[name], options)


def make(owner: str, cls: type[S], options: Mapping[str, Any]) -> S:
    """The options of an owner, ``"loss focal"``, which errors name."""
    require_known(owner, options, declarations(cls), "option")
    try:
        return cls(**options)
    except SettingError as error:
        raise error.at(f"{owner}, option {error.where}") from error


class SignatureSettings(Settings):
    """Options that a signature declares; its defaults are its author's to judge."""

    model_config = ConfigDict(validate_default=False)

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given."""
        return {name: self.__dict__[name] for name in self.model_fields_set}


@functools.cache
def signature_settings(cls: Callable[..., Any]) -> type[SignatureSettings]:
    """The keyword-only arguments of a class that declares no settings, as settings.

    An annotation that cannot be evaluated, or that pydantic cannot check, allows every value.
    """
    function = cls.__init__ if inspect.isclass(cls) else cls
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError:  # of a name that is imported for type checkers only
        hints = {}
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            has_default = parameter.default is not parameter.empty
            default = parameter.default if has_default else REQUIRED
            fields[name] = (hints.get(name, Any), setting(default, help=""))
    return _model(getattr(cls, "__name__", "Options"), fields)


def _model(name: str, fields: Mapping[str, Any]) -> type[SignatureSettings]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Field name .* shadows an attribute")
        try:
            model = create_model(name, __base__=SignatureSettings, **fields)
        except PydanticSchemaGenerationError:
            free: dict[str, Any] = {field: (Any, made) for field, (_, made) in fields.items()}
            model = create_model(name, __base__=SignatureSettings, **free)
    return model
