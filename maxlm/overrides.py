"""Configs from files, and `--set a.b=c` on top of them: typed by the field, with nearest-name errors.

Standard library only. Every mistake is a `ConfigError` of one line that names the file and line, or the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import maxlm.config
from maxlm.config import RunConfig
from maxlm.schema import ConfigError, describe, flatten, from_dict, require, to_dict, unknown_key


def load_config(path: str | Path) -> RunConfig:
    """What `config()` of the Python file at `path` returns, or a run's config.json.

    A variant of another recipe calls `load_config(Path(__file__).with_name("llama3_8b.py"))` and replaces fields.
    Raises ConfigError where the file is missing, does not run, or has no `config()` returning a RunConfig.
    """
    path = Path(path)
    if path.suffix == ".json":
        try:
            return from_dict(RunConfig, json.loads(_read(path)))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    built = call_in_file(path, "config", "a RunConfig")
    require(isinstance(built, RunConfig), f"{path}: config() must return a RunConfig, not {type(built).__name__}")
    return built


def call_in_file(path: Path, name: str, kind: str) -> Any:
    """Executes the Python file at `path` and returns what its function `name` does, `kind` in words.

    Raises ConfigError where the file is missing, does not run, or has no such function.
    """
    source = _read(path)
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
        build = module.__dict__.get(name)
        require(callable(build), f"{path}: no function {name}() in this file; it must return {kind}")
        return build()
    except Exception as error:
        raise ConfigError(_where_and_why(path, error)) from error


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """`config` with each 'a.b=value' applied; of one key given twice the last counts.

    The value is read by the type of the field: 1_000, 3e-4, true, none, a name, or JSON for a list. The result
    is checked once, at the end, so fields that depend on each other can change together.
    Raises ConfigError for an unknown key (naming the nearest), a value of the wrong type, or an invalid result.
    """
    parsed = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        require(bool(equals and key), f"override {override!r} must have the form section.field=value")
        parsed[key] = _parse(_hint_of(key), text, key)
    return with_values(config, parsed)


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`config` with each field that a dotted key names replaced, checked once at the end like `apply_overrides`."""
    table = to_dict(config)
    for key, value in values.items():
        _hint_of(key)  # raises for a key that is unknown or a section
        *sections, name = key.split(".")
        section = table
        for part in sections:
            section = section[part]
        section[name] = value
    return from_dict(type(config), table)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}{_nearby(path)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a Python file: it is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    there = sorted(p.name for p in path.parent.glob("*.py"))
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5) or difflib.get_close_matches(
        f"{path.name}.py", there, n=3, cutoff=0.5
    )
    if near:
        return "; did you mean " + " or ".join(str(path.parent / name) for name in near) + "?"
    return f"; {path.parent} holds {', '.join(there)}" if there else f"; {path.parent} holds no .py files"


def _where_and_why(path: Path, error: Exception) -> str:
    """'FILE:LINE: reason' where LINE is the last line of the config file that ran."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}: {error.msg}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    reason = " ".join(str(error).split())
    if not isinstance(error, ConfigError):
        reason = f"{type(error).__name__}: {reason}" + _nearest_argument(str(error))
    elif not lines:
        return reason  # one of ours about the file as a whole
    return f"{path}{f':{lines[-1]}' if lines else ''}: {reason}"


def _nearest_argument(message: str) -> str:
    """Python 3.11 does not say which keyword was meant by a misspelt one; the config classes know."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    cls = getattr(maxlm.config, found[1], None) if found else None
    if not dataclasses.is_dataclass(cls):
        return ""
    names = [f.name for f in dataclasses.fields(cls)]
    near = difflib.get_close_matches(found[2], names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def _hint_of(key: str) -> Any:
    """The declared type of the field that a dotted key names."""
    cls: Any = RunConfig
    walked: list[str] = []
    for name in key.split("."):
        if typing.get_origin(cls) is tuple:
            raise ConfigError(f"{'.'.join(walked)} is a list: give the whole of it as JSON, not {key!r}")
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if name not in hints:
            raise ConfigError(unknown_key(key, list(flatten(RunConfig()))))
        cls = hints[name]
        walked.append(name)
    if dataclasses.is_dataclass(cls):
        fields = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(cls))
        raise ConfigError(f"{key} is a section: set its fields one by one ({fields})")
    return cls


def _parse(hint: Any, text: str, key: str) -> Any:
    """The value that `text` stands for in a field of type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return _parse_list(args[0], text, key)
    kinds = args if origin in (typing.Union, types.UnionType) else (hint,)
    for kind in sorted(kinds, key=lambda k: k is str):  # text last: everything reads as text
        for value in _readings(kind, text):
            return value
    raise ConfigError(f"{key}={text!r} must be {describe(hint)}")


def _readings(kind: Any, text: str) -> list[Any]:
    """What `text` reads as under one plain type: a list of one value, or of none."""
    word = text.strip()
    if typing.get_origin(kind) is Literal:
        return [a for a in typing.get_args(kind) if str(a) == word]
    if kind is type(None):
        return [None] if word.lower() in ("none", "null") else []
    if kind is bool:
        return [word.lower() == "true"] if word.lower() in ("true", "false") else []
    if kind is str:
        return [text]
    try:
        value = kind(word)  # int and float take 1_000 as Python source does
    except ValueError:
        return []
    return [value] if math.isfinite(value) else []


def _parse_list(item: Any, text: str, key: str) -> tuple[Any, ...]:
    """A JSON list; `from_dict` turns the objects in it into dataclasses and checks the rest."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{key}={text!r} must be a JSON list: {error}") from None
    require(isinstance(values, list), f"{key}={text!r} must be a JSON list, not {type(values).__name__}")
    if dataclasses.is_dataclass(item):
        needed = [f.name for f in dataclasses.fields(item)
                  if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        for value in values:
            missing = [n for n in needed if isinstance(value, dict) and n not in value]
            require(not missing, f"{key}: {json.dumps(value)} lacks {', '.join(missing)}")
    return tuple(values)
