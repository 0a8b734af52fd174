"""Chat templates within bounds, as one may come with a request: no endless loops, no huge texts."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.filters import do_format

TEXT_CHARS_MAX = 32 << 20
"""A template that writes more is stopped: more than the tokens of any model."""
SECONDS_MAX = 5.0
"""A template that takes longer is stopped (the engine: 30 s)."""
_POWER_MAX = 4096
_SIZED = (str, list, tuple)
_WIDENING = ("batch", "center", "indent", "slice")
"""Filters that make much of little, given a large number."""
_WIDTH_MAX = 1 << 16
_WIDE_FORMAT = re.compile(r"(?:%[^%a-zA-Z]*|\{[^{}]*)[0-9]{6}")
_PIECES_AT_A_TIME = 32


class TooMuchError(Exception):
    """A template took too long or wrote too much."""


class _Budget(threading.local):
    """When the template that renders in this thread must be done."""

    until: float | None = None


_budget = _Budget()


def _tick() -> None:
    if _budget.until is not None and time.monotonic() > _budget.until:
        raise TooMuchError(f"it takes more than {SECONDS_MAX:g} s")


def text_of(template: jinja2.Template, context: dict[str, Any]) -> str:
    """Return what a template writes. TooMuchError where that is too much or takes too long; and whatever a template raises."""
    pieces: list[str] = []
    chars = 0
    _budget.until = time.monotonic() + SECONDS_MAX
    try:
        generated = template.generate(context)
        while some := list(islice(generated, _PIECES_AT_A_TIME)):
            pieces += some
            chars += sum(map(len, some))
            if chars > TEXT_CHARS_MAX:
                raise TooMuchError(f"it writes more than {TEXT_CHARS_MAX} characters")
            _tick()
    finally:
        _budget.until = None
    return "".join(pieces)


def bound(environment: Any, tree: nodes.Template) -> None:
    """Make loops, calls and growing values of a template look at its budget.

    Out of reach stay single filters that make a huge text of many pieces at once (``join``, ``replace``, ``wordwrap``).
    """
    # An overlay shares these with the environment that it was made of: change copies.
    environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}  # writes at length
    modest = {name: _modest(environment.filters[name]) for name in _WIDENING}
    environment.filters = {**environment.filters, **modest, "format": _modest_format, "_counted": _counted, "_sized": _sized}
    call = environment.call
    call_binop = environment.call_binop

    def bounded_call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _tick()
        _check_method(function, (*args, *kwargs.values()))
        return call(context, function, *args, **kwargs)

    def bounded_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_growth(operator, left, right)
        return call_binop(context, operator, left, right)

    environment.call = bounded_call
    environment.call_binop = bounded_binop
    environment.intercepted_binops = frozenset({"+", "*", "**", "%"})
    for loop in tree.find_all(nodes.For):
        loop.iter = _filtered(environment, loop.iter, "_counted")
    _wrap_concatenations(environment, tree)


def _wrap_concatenations(environment: Any, node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        for position, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _wrap_concatenations(environment, child)
            if isinstance(child, nodes.Concat):
                wrapped = _filtered(environment, child, "_sized")
                if isinstance(value, list):
                    value[position] = wrapped
                else:
                    setattr(node, field, wrapped)


def _filtered(environment: Any, node: Any, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=environment)


def _modest(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses a width which would make a huge text of a short one."""

    @functools.wraps(function)
    def modest(*args: Any, **kwargs: Any) -> Any:
        _check_widths((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return modest


def _modest_format(template: str, *args: Any, **kwargs: Any) -> str:
    """jinja's own ``format`` filter, but for formats of a huge width."""
    _check_format(str(template))
    return do_format(template, *args, **kwargs)


def _check_method(function: Any, values: Sequence[Any]) -> None:
    """Refuse a text's method that would make a huge text of it."""
    if not isinstance(getattr(function, "__self__", None), str):
        return
    if function.__name__ in ("center", "expandtabs", "ljust", "rjust", "zfill"):
        _check_widths(values)
    elif function.__name__ in ("format", "format_map"):
        _check_format(function.__self__)


def _check_widths(values: Sequence[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _WIDTH_MAX for value in values):
        raise TooMuchError(f"it asks for a width of more than {_WIDTH_MAX}")


def _check_format(template: str) -> None:
    if _WIDE_FORMAT.search(template):
        raise TooMuchError("it asks for a format of too many digits")


def _counted(values: Any) -> Any:
    _tick()
    if isinstance(values, list | tuple | dict | str | range) and len(values) <= 256:
        return values
    return _ticking(values)


def _ticking(values: Any) -> Iterator[Any]:
    for position, value in enumerate(values):
        if not position & 255:
            _tick()
        yield value


def _sized(value: Any) -> Any:
    if isinstance(value, str) and len(value) > TEXT_CHARS_MAX:
        raise TooMuchError(f"it makes a text of more than {TEXT_CHARS_MAX} characters")
    return value


def _check_growth(operator: str, left: Any, right: Any) -> None:
    size: int
    if operator == "+" and isinstance(left, _SIZED) and isinstance(right, _SIZED):
        size = len(left) + len(right)
    elif operator == "*" and isinstance(left, _SIZED) and isinstance(right, int):
        size = len(left) * right
    elif operator == "*" and isinstance(right, _SIZED) and isinstance(left, int):
        size = len(right) * left
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        size = TEXT_CHARS_MAX + 1 if left.bit_length() * right > _POWER_MAX else 0
    elif operator == "*" and isinstance(left, int) and isinstance(right, int):
        size = TEXT_CHARS_MAX + 1 if left.bit_length() + right.bit_length() > _POWER_MAX else 0
    elif operator == "%" and isinstance(left, str):
        size = TEXT_CHARS_MAX + 1 if re.search(r"[0-9]{7}|\*", left) else 0
    else:
        return
    if size > TEXT_CHARS_MAX:
        raise TooMuchError(f"{operator} makes a value that is too large")
