"""Strict YAML for the typed config classes: load, override, dump.

The classes stand beside the parts that they configure; this module only knows dataclasses. YAML holds values, never
class paths. Whatever does not fit is a `UserError` of one line naming the key, what was found and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from ldm.errors import UserError, user_input
from ldm.files import write_text

Config = TypeVar("Config")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which plain YAML silently lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        merge = "tag:yaml.org,2002:merge"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise UserError(f"line {node.start_mark.line + 1}: the key {repeated[0]!r} is written twice; keep one")
        return super().construct_mapping(node, deep=deep)


def load(config_class: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides and build the config; raises `UserError`."""
    with user_input(f"config {path}"):
        text = path.read_text(encoding="utf-8")
    values = _parse(text, f"config {path}")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"config {path}: found {_shown(values)}; a config is a mapping of keys to values")
    for override in overrides:
        _apply_override(values, override)
    return build(config_class, values)


def load_section(config_class: type[Config], path: Path, section: str) -> Config:
    """Build one section of a config file, whatever else the file holds."""
    with user_input(f"config {path}"):
        values = _parse(path.read_text(encoding="utf-8"), f"config {path}")
    if not isinstance(values, dict) or not isinstance(values.get(section), dict):
        raise UserError(f"config {path}: found no section {section!r}; add one")
    return build(config_class, values[section], section)


def build(config_class: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Build a config dataclass from plain values; `where` is the dotted path of its section."""
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(_unknown_key(str(key), where, config_class))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{_join(where, name)}: missing; it is required ({_allowed(hints[name])})")
    built = {name: _convert(value, hints[name], _join(where, name)) for name, value in values.items()}
    try:
        return config_class(**built)
    except ValueError as error:
        raise UserError(_join(where, str(error)) if where else str(error)) from error


def dump(config: Any) -> str:
    """The resolved config as YAML that `load` reads back to an equal object."""
    return yaml.safe_dump(to_values(config), sort_keys=False, allow_unicode=True)


def to_values(config: Any) -> Any:
    """Nested dicts and lists of a config dataclass."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_values(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
    if isinstance(config, Mapping):
        return {key: to_values(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_values(value) for value in config]
    return config


def difference(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys in which two trees of plain values differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from difference(old.get(key), new.get(key), _join(where, str(key)))
    elif old != new:
        yield where, old, new


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{what}: not valid YAML: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: allowed is key.sub=value, e.g. training.steps=1000")
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section, {})
        if not isinstance(inner, dict):
            raise UserError(
                f"override {override!r}: {section!r} holds {_shown(inner)}, so nothing can be set inside it"
            )
        # A copy: YAML anchors make two sections the same object, and only the named one is to change.
        values[section] = dict(inner)
        values = values[section]
    values[last] = _parse(text, f"override {override!r}")


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check `value` against a type hint; lists become tuples, whole numbers become floats where floats are wanted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal and any(
        value is choice or (value == choice and type(value) is type(choice)) for choice in arguments
    ):
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _convert(item, arguments[1], _join(where, str(key))) for key, item in value.items()}
    if hint is float and (number := _as_float(value)) is not None:
        return number
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise UserError(f"{where}: found {_shown(value)}; allowed is {_allowed(hint)}{_nearest_choice(value, hint)}")


def _convert_union(value: Any, arguments: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [argument for argument in arguments if argument is not type(None)]
    if len(choices) == 1:
        try:
            return _convert(value, choices[0], where)
        except UserError as error:
            allowed = _allowed(choices[0])
            raise UserError(str(error).replace(f"allowed is {allowed}", f"allowed is {allowed} or null")) from error
    for choice in choices:
        try:
            return _convert(value, choice, where)
        except UserError:
            continue
    raise UserError(f"{where}: found {_shown(value)}; allowed is {' or '.join(map(_allowed, arguments))}")


def _as_float(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    # YAML 1.1 reads `1e-4` (no dot) as text; people write it all the time.
    if isinstance(value, str) and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _unknown_key(key: str, where: str, config_class: type) -> str:
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {_join(where, close[0])}? " if close else ""
    return f"{_join(where, key)}: unknown key; {hint}allowed here: {', '.join(names)}"


def _nearest_choice(value: Any, hint: Any) -> str:
    choices = [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _allowed(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_allowed, arguments))
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"a list, each item {_allowed(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a mapping of keys to values"
    names = {type(None): "null", int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, str(hint))


def _shown(value: Any) -> str:
    names = {bool: "true/false", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}
    return f"{value!r} ({names.get(type(value), 'nothing' if value is None else type(value).__name__)})"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def claim_run_folder(config: Any, folder: Path, free: Sequence[str]) -> None:
    """Write the resolved config to `folder/config.yaml`, or check it against the one that the run began with.

    Keys that begin with one of `free` may change between parts of a run; any other difference is a `UserError`, since
    a run that goes on with another model or other data is neither the old run nor a new one. A key that there was not
    yet when the run began has its default.
    """
    path = folder / "config.yaml"
    if path.exists():
        began_with = to_values(load(type(config), path))
        for key, old, new in difference(began_with, to_values(config)):
            if not key.startswith(tuple(free)):
                raise UserError(
                    f"{key}: found {_shown(new)}, but the run in {folder} began with {_shown(old)}; "
                    f"give {key}={_shown(old)} to go on with it, or out=ANOTHER_FOLDER to start a new run"
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, dump(config))  # every process writes the same
