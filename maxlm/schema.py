"""Frozen dataclasses as a checked schema: type checks, JSON round trip, nearest-name errors.

Standard library only. What the fields mean is in config/.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal


class ConfigError(ValueError):
    """A user's mistake in a config. The message is one line that names the field and the fix."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def positive(section: str, **values: float) -> None:
    """Raises ConfigError, naming the field, for a value that is not above 0."""
    for name, value in values.items():
        require(value > 0, f"{section}.{name}={value!r} must be greater than 0")


def not_negative(section: str, **values: float) -> None:
    """Raises ConfigError, naming the field, for a value below 0."""
    for name, value in values.items():
        require(value >= 0, f"{section}.{name}={value!r} must be 0 or greater")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, ready for JSON. `from_dict(RunConfig, to_dict(c)) == c`."""
    return dataclasses.asdict(config)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted leaf keys to values: {'model.num_layers': 12, ...}."""
    leaves: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            leaves.update(flatten(value, f"{prefix}{f.name}."))
        else:
            leaves[prefix + f.name] = value
    return leaves


def from_dict(cls: type, values: Any, where: str = "") -> Any:
    """Builds the dataclass `cls` from nested plain values; missing keys take their defaults.

    Raises ConfigError for an unknown key (naming the nearest), a wrong type or a value out of range.
    """
    require(isinstance(values, dict), f"{where or 'config'} must be a table of fields, not {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(unknown_key(f"{where}{key}", [f"{where}{name}" for name in hints]))
        built[key] = _from_plain(hints[key], value, f"{where}{key}")
    return cls(**built)


def _from_plain(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, f"{where}.")
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_from_plain(typing.get_args(hint)[0], item, where) for item in value)
    return value


def unknown_key(key: str, known: list[str]) -> str:
    """One line for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # the right leaf name under the wrong section
        near = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f"unknown config key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def check_types(config: Any, section: str) -> None:
    """Raises ConfigError where a field's value is not of its declared type (an int passes for a float)."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_a(value, hint):
            key = f"{section}.{name}" if section else name
            raise ConfigError(f"{key}={value!r} must be {describe(hint)}")


def _is_a(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """The type of a field in words a user can act on: \"one of 'a', 'b'\", 'an integer', ..."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple:
        return f"a list, each {describe(args[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
