"""Plain values of a configuration as a frozen struct. Every refusal is a ConfigError that names the place and what is allowed.

Strict as llm-d is: unknown fields are errors; ``null`` stands for a field's default.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from kvatlas.config.go_values import GO_DURATION_FORMS, parse_go_duration
from kvatlas.errors import ConfigError

DEPTH_MAX = 32

S = TypeVar("S", bound=msgspec.Struct)


class GoDuration(float):
    """Seconds, written as Go does: "2s", "100ms". Source: Go, time.ParseDuration; Kubernetes, metav1.Duration."""


class GoNanoseconds(float):
    """Seconds, written as a number of nanoseconds: a Go time.Duration that is read from JSON as it is."""


def read_parameters(kind: type[S], tree: object, path: str) -> S:
    """Return a struct with the tree's values; what the tree leaves out has its default. ``path``: where the tree is."""
    known: dict[str, inspect.Type] = {}
    plain = _plain(inspect.type_info(kind), {} if tree is None else tree, path, known, 0)
    try:
        return msgspec.convert(plain, kind, dec_hook=_go_value)
    except msgspec.ValidationError as error:
        raise _refused(str(error), path, known) from None


def near_names(name: str, names: Mapping[str, object] | list[str]) -> list[str]:
    """Return up to three of ``names`` that were probably meant, the likeliest first."""
    return difflib.get_close_matches(name, list(names), 3, 0.6)


def unknown_name(path: str, what: str, name: str, names: list[str]) -> ConfigError:
    """Return the error for a name that nothing has."""
    near = near_names(name, names)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return ConfigError(path, f"{name!r:.80} is no {what}{hint}", ", ".join(names) or "none")


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _plain(info: inspect.Type, value: object, path: str, known: dict[str, inspect.Type], depth: int) -> object:
    """Return the value without nulls, after its names were checked against the struct that they are to become."""
    known[path] = info
    if depth > DEPTH_MAX:
        raise ConfigError(path, "is nested too deeply", f"at most {DEPTH_MAX} levels")
    if isinstance(info, inspect.UnionType):
        wanted = _MAPPINGS if isinstance(value, dict) else _LISTS
        info = next((one for one in info.types if isinstance(one, wanted)), info)
    if isinstance(info, inspect.StructType):
        return _plain_struct(info, value, path, known, depth)
    if isinstance(value, dict):
        inner = info.value_type if isinstance(info, inspect.DictType) else inspect.AnyType()
        return {
            _key(key, path): _plain(inner, one, join(path, str(key)), known, depth + 1)
            for key, one in value.items()
            if one is not None
        }
    if isinstance(value, list):
        item = info.item_type if isinstance(info, _LISTS) else inspect.AnyType()
        return [_plain(item, one, f"{path}[{position}]", known, depth + 1) for position, one in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(path, f"{value!r:.60} is no value that JSON has", "text (in quotes), a finite number, true, false")


def _plain_struct(info: inspect.StructType, value: object, path: str, known: dict[str, inspect.Type], depth: int) -> object:
    fields = {field.encode_name: field for field in info.fields}
    if not isinstance(value, dict):
        raise ConfigError(path, f"{value!r:.60} is no mapping", f"a mapping with {', '.join(fields) or 'nothing in it'}")
    found = {}
    for key, one in value.items():
        if key not in fields:
            name = str(key)
            raise unknown_name(join(path, name), "field", name, list(fields))
        if one is not None:
            found[key] = _plain(fields[key].type, one, join(path, key), known, depth + 1)
    for key, field in fields.items():
        if field.required and key not in found:
            raise ConfigError(join(path, key), "is missing", _allowed(field.type))
    return found


def _key(key: object, path: str) -> str:
    if isinstance(key, str | int | float):
        return str(key).lower() if isinstance(key, bool) else str(key)
    raise ConfigError(path, f"{key!r:.60} is no name", "text")


def _go_value(kind: type, value: Any) -> Any:
    if issubclass(kind, GoDuration) and isinstance(value, str):
        return kind(parse_go_duration(value))
    if issubclass(kind, GoNanoseconds) and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return kind(value / 1e9)
    raise ValueError("does not fit")


_AT = re.compile(r"(?s)(.*) - at `\$\.?(.*)`")
_EXPECTED = re.compile(r"(?s)Expected `.*`, got `(.*)`")
_OF_FIELD = re.compile(r"(?s)(?:(\w+): )?(.*?); allowed: (.*)")
_WORDS = {
    "str": "text",
    "object": "a mapping",
    "array": "a list",
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
}


def _refused(message: str, path: str, known: Mapping[str, inspect.Type]) -> ConfigError:
    """Turn msgspec's message into ours."""
    if found := _AT.fullmatch(message):
        message = found[1]
        path = path + found[2] if found[2].startswith("[") else join(path, found[2])
    allowed = _allowed(known[path]) if path in known else "see docs/endpoint-picker-config.md"
    if found := _EXPECTED.fullmatch(message):
        return ConfigError(path, f"is {_WORDS.get(found[1], found[1])}", allowed)
    if found := _OF_FIELD.fullmatch(message):
        return ConfigError(join(path, found[1]) if found[1] else path, found[2], found[3])
    if message.startswith(("Expected", "Invalid enum value")):
        return ConfigError(path, "does not fit", allowed)
    return ConfigError(path, message, allowed)


_MAPPINGS = (inspect.StructType, inspect.DictType)
_LISTS = (inspect.ListType, inspect.VarTupleType, inspect.SetType, inspect.FrozenSetType)
_NAMES: dict[type, str] = {
    inspect.StrType: "text",
    inspect.BoolType: "true or false",
    inspect.IntType: "an integer",
    inspect.FloatType: "a number",
}
_BOUNDS = (
    ("ge", "at least"),
    ("gt", "more than"),
    ("le", "at most"),
    ("lt", "less than"),
    ("min_length", "of length at least"),
)


def _allowed(info: inspect.Type) -> str:
    """Return what fits, in words."""
    match info:
        case inspect.Metadata():
            text = _allowed(info.type)
        case inspect.UnionType():
            text = " or ".join(_allowed(one) for one in info.types if not isinstance(one, inspect.NoneType))
        case inspect.LiteralType():
            text = ", ".join(str(value) or '""' for value in info.values)
        case inspect.EnumType():
            text = ", ".join(str(one.value) for one in info.cls)
        case inspect.StructType():
            text = "a mapping with " + ", ".join(field.encode_name for field in info.fields)
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType() | inspect.FrozenSetType():
            text = f"a list, each {_allowed(info.item_type)}"
        case inspect.CustomType():
            text = "a whole number of nanoseconds" if issubclass(info.cls, GoNanoseconds) else GO_DURATION_FORMS
        case _:
            words = [f"{word} {bound:g}" for name, word in _BOUNDS if (bound := getattr(info, name, None)) is not None]
            text = ", ".join([_NAMES.get(type(info), "a mapping"), *words])
    return text
