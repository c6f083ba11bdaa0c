"""Knobs from outside, text or JSON, to a frozen dataclass: names are checked, values are read by the field's type."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build(table: Mapping[str, type[T]], name: str, given: Mapping[str, object] | None = None) -> T:
    """The entry `name` of a table such as METHODS or POLICIES, with these fields.

    A field of a nested dataclass is given as {"rounding": {"clip": "mse"}} or as {"rounding.clip": "mse"}. Text is read
    as the field's type ("0.6", "true"). An unknown name, an unknown field and a value of another type are errors that
    say what would do.
    """
    if name not in table:
        raise ValueError(f"{name!r} is none of {', '.join(sorted(table))}")
    return _filled(table[name], dict(given or {}), name)


def names(kind: type[Any]) -> list[str]:
    """The fields of an entry, in their order."""
    return [field.name for field in dataclasses.fields(kind)]


def _filled(kind: type[T], given: dict[str, object], where: str) -> T:
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind.__name__} has no fields: only dataclasses are built from fields")
    hints = get_type_hints(kind)
    known = names(kind)
    inner: dict[str, dict[str, object]] = {}
    values: dict[str, Any] = {}
    for key, value in given.items():
        head, _, rest = key.partition(".")
        if head not in known:
            raise ValueError(f"{where} has no field {head!r}: it has {', '.join(known) or 'none'}")
        if rest:
            inner.setdefault(head, {})[rest] = value
        elif dataclasses.is_dataclass(hints[head]) and isinstance(value, Mapping):
            inner.setdefault(head, {}).update(value)
        else:
            values[head] = _read(hints[head], value, f"{where}.{head}")
    for head, fields in inner.items():
        if not dataclasses.is_dataclass(hints[head]):
            raise ValueError(f"{where}.{head} has no fields of its own: it is a {hints[head]}")
        values[head] = _filled(hints[head], fields, f"{where}.{head}")
    return kind(**values)


def _read(kind: Any, value: object, where: str) -> Any:
    refused = ValueError(f"{where} is {_name(kind)}; got {value!r}")
    origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind):
            return value
        raise refused
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        (kind,) = [option for option in get_args(kind) if option is not type(None)]
        return _read(kind, value, where)
    if origin is tuple:
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise refused
        return tuple(_read(get_args(kind)[0], part, where) for part in parts)
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise refused
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise refused
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise refused
    if kind is str and not isinstance(value, str):
        raise refused
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise refused from None


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(kind))
    return getattr(kind, "__name__", None) or str(kind)
