"""One setting's value: what its annotation allows, in words, and the check of a given value against it."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from kvatlas.config.quantities import (
    DURATION_FORMS,
    SIZE_FORMS,
    Bytes,
    Seconds,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)
from kvatlas.errors import ConfigError


class Secret(str):
    """Text that does not show itself when settings are printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret('***')"


class Shape(typing.NamedTuple):
    """A setting's annotation, taken apart. At most one of ``struct``, ``item``, ``entry`` is set; none for a scalar."""

    base: Any
    optional: bool
    doc: str
    limits: tuple[msgspec.Meta, ...]
    struct: type[msgspec.Struct] | None = None
    item: Any = None
    """The items' annotation where the setting is a list."""
    entry: Any = None
    """The values' annotation where it is a mapping."""


def shape_of(annotation: Any) -> Shape:
    """Take an annotation apart."""
    limits: list[msgspec.Meta] = []
    optional = False
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation, *metas = typing.get_args(annotation)
            limits += [meta for meta in metas if isinstance(meta, msgspec.Meta)]
        elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
            (annotation,) = (arg for arg in typing.get_args(annotation) if arg is not type(None))
            optional = True
        else:
            break
    doc = next((meta.description for meta in reversed(limits) if meta.description), "")
    shape = Shape(annotation, optional, doc, tuple(limits))
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return shape._replace(struct=annotation)
    if origin is tuple:
        return shape._replace(item=typing.get_args(annotation)[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return shape._replace(entry=typing.get_args(annotation)[1])
    return shape


def field_types(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the annotations of a Struct by Python name, limits included."""
    return typing.get_type_hints(kind, include_extras=True)


def near_miss(name: str, names: Sequence[str], cutoff: float = 0.6) -> str | None:
    """Return the one of ``names`` that was probably meant, if any."""
    by_folded = {candidate.lower().replace("_", ""): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), list(by_folded), 1, cutoff)
    return by_folded[close[0]] if close else None


def type_text(annotation: Any) -> str:
    """Return a setting's type in a word or two."""
    shape = shape_of(annotation)
    if shape.item is not None:
        return "list" if shape_of(shape.item).struct else f"list of {type_text(shape.item)}"
    if shape.entry is not None:
        return f"mapping of name to {type_text(shape.entry)}"
    if typing.get_origin(shape.base) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(shape.base)))
    names = {bool: "true or false", int: "integer", float: "number", Seconds: "duration", Bytes: "size"}
    return names.get(shape.base, "text")


def allowed_text(annotation: Any) -> str:
    """Return what a setting allows, as the end of an error."""
    shape = shape_of(annotation)
    for meta in shape.limits:
        if meta.extra and "allowed" in meta.extra:
            return str(meta.extra["allowed"])
    forms = {Seconds: DURATION_FORMS, Bytes: SIZE_FORMS, str: "text (in quotes if it looks like a number)"}
    text = forms.get(shape.base) or type_text(annotation)
    signs = (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than"))
    for meta in shape.limits:
        for name, word in signs:
            bound = getattr(meta, name)
            if bound is not None:
                text += f", {word} {_shown(shape.base, bound)}"
        if meta.min_length:
            text += ", not empty"
    return text


def default_text(annotation: Any, field: msgspec.structs.FieldInfo) -> str:
    """Return a field's default as it would be written in a file."""
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if default is None:
        return "none"
    shape = shape_of(annotation)
    if shape.base in (Seconds, Bytes):
        return _shown(shape.base, default)
    if isinstance(default, bool):
        return str(default).lower()
    return msgspec.json.encode(default).decode()


def of_text(annotation: Any, text: str) -> tuple[bool, Any]:
    """Return (True, value) where a variable's text is the value itself, or (False, None) where it must be parsed first.

    Empty text unsets a setting that may be absent.
    """
    shape = shape_of(annotation)
    if shape.optional and not text:
        return True, None
    takes_text = shape.base in (str, Secret, Seconds, Bytes) or typing.get_origin(shape.base) is Literal
    return takes_text, text if takes_text else None


def convert_scalar(annotation: Any, value: Any, path: str) -> Any:
    """Return ``value`` as the setting's type; ConfigError where type or limits are not met."""
    shape = shape_of(annotation)
    allowed = allowed_text(annotation)
    shown = repr(value)[:60]
    if shape.base is Secret:
        if not isinstance(value, str):
            raise ConfigError(path, "is not text", allowed)
        return Secret(value)
    if typing.get_origin(shape.base) is Literal:
        choices = typing.get_args(shape.base)
        if value not in choices:
            close = near_miss(str(value), choices)
            hint = f'; did you mean "{close}"?' if close else ""
            raise ConfigError(path, f"{shown} is none of them{hint}", ", ".join(choices))
        return value
    converted = _typed(shape.base, value)
    if converted is None:
        raise ConfigError(path, f"{shown} is no {type_text(annotation)}", allowed)
    if not all(_within(meta, converted) for meta in shape.limits):
        raise ConfigError(path, f"{shown} is out of bounds" if not isinstance(value, str) else f"{shown} does not fit", allowed)
    return converted


def _typed(base: Any, value: Any) -> Any:
    """Return ``value`` as ``base``, or None where it is something else."""
    try:
        if base is Seconds:
            return parse_duration(value)
        if base is Bytes:
            return parse_size(value)
    except ValueError:
        return None
    if base is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    if base is int and isinstance(value, bool):
        return None
    return value if isinstance(value, base) else None


def _within(meta: msgspec.Meta, value: Any) -> bool:
    return (
        (meta.ge is None or value >= meta.ge)
        and (meta.gt is None or value > meta.gt)
        and (meta.le is None or value <= meta.le)
        and (meta.lt is None or value < meta.lt)
        and (meta.min_length is None or len(value) >= meta.min_length)
        and (meta.pattern is None or re.fullmatch(meta.pattern, value) is not None)
    )


def _shown(base: Any, value: Any) -> str:
    if base is Seconds:
        return format_duration(value)
    return format_size(value) if base is Bytes else f"{value:g}"
