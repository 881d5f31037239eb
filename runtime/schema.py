"""Frozen dataclasses to JSON and back, strictly: an unknown, missing or mistyped key is named.

Standard library only, because the runtime's install stays small.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


class SchemaError(ValueError):
    """A JSON value does not fit its dataclass; the message starts with the key's path."""


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and dicts as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value


def from_json(cls: type[T], data: Any, path: str = "") -> T:
    """Build dataclass `cls` from parsed JSON.

    Raises:
        SchemaError: a key is unknown, missing, or of the wrong type.
    """
    if not isinstance(data, dict):
        raise SchemaError(
            f"{path or 'the document'} should be an object, not {type(data).__name__}"
        )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    for key in data:
        if key not in fields:
            raise SchemaError(f"unknown key {_join(path, key)}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"missing key {_join(path, name)}")
    return cls(**values)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else str(key)


def _of_kind(classes: list[Any], data: Any, path: str) -> Any:
    """Of dataclasses in a union, the one whose `kind`, a literal, is the object's."""
    by_kind = {typing.get_args(typing.get_type_hints(cls)["kind"])[0]: cls for cls in classes}
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in by_kind:
        raise SchemaError(f"{_join(path, 'kind')} is {kind!r}, not one of {', '.join(by_kind)}")
    return by_kind[kind]


def _value(hint: Any, data: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        if all(dataclasses.is_dataclass(kind) for kind in kinds) and len(kinds) > 1:
            return from_json(_of_kind(kinds, data, path), data, path)
        if len(kinds) == 1:
            return _value(kinds[0], data, path)
        if type(data) not in kinds:  # a union of plain types
            names = " or ".join(kind.__name__ for kind in kinds)
            raise SchemaError(f"{path} should be {names}, not {data!r}")
        return data
    if origin is typing.Literal:
        if data not in args:
            raise SchemaError(f"{path} is {data!r}, not one of {', '.join(map(repr, args))}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise SchemaError(f"{path} should be a list, not {type(data).__name__}")
        if args[-1] is not Ellipsis and len(data) != len(args):
            raise SchemaError(f"{path} should have {len(args)} entries, not {len(data)}")
        kinds = [args[0]] * len(data) if args[-1] is Ellipsis else list(args)
        return tuple(
            _value(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, data, strict=True))
        )
    if origin is dict:
        if not isinstance(data, dict):
            raise SchemaError(f"{path} should be an object, not {type(data).__name__}")
        return {k: _value(args[1], v, _join(path, k)) for k, v in data.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), data, path)
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, hint) or (hint is int and isinstance(data, bool)):
        raise SchemaError(f"{path} should be {hint.__name__}, not {data!r}")
    return data
