"""Hashes and history in Rust, where the native core is installed. ``hashes.py`` and ``history.py`` are the specification."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Container, Mapping, Sequence
from itertools import count
from typing import Any, Protocol

from kvatlas.route.endpoint import EndpointName
from kvatlas.route.prefix.history import History, HistoryStats


class PieceHashes(Protocol):
    def __call__(self, content: memoryview, piece_bytes: int, root: int, added: Mapping[int, bytes]) -> array[int]:
        """Return the chained hashes of the pieces of ``content``, as ``piece_hashes`` does."""
        ...


class RouteHistory(Protocol):
    """Which blocks were routed to whom. Not thread-safe: plugins are called under the router's lock."""

    def match(self, hashes: Sequence[int]) -> Mapping[EndpointName, int]:
        """Return how many leading blocks each endpoint got, of those that got any."""
        ...

    def record(self, endpoint: EndpointName, hashes: Sequence[int], capacity_blocks: int) -> None:
        """Note that a prompt was routed to an endpoint whose cache holds so many blocks."""
        ...

    def keep(self, endpoints: Container[EndpointName]) -> None:
        """Forget all endpoints but these."""
        ...

    def stats(self) -> HistoryStats: ...


def make_history(bytes_max: int, *, natively: bool = True) -> RouteHistory:
    """Return an empty history. ``natively``: in Rust, where the native core is installed."""
    return NativeHistory(bytes_max) if natively and _History is not None else History(bytes_max)


class NativeHistory:
    """A :class:`~kvatlas.route.prefix.history.History` in Rust, which knows endpoints by small numbers."""

    def __init__(self, bytes_max: int) -> None:
        """TypeError where there is no native core."""
        self._core = _History(min(bytes_max, sys.maxsize))
        self._numbers: dict[EndpointName, int] = {}
        self._names: dict[int, EndpointName] = {}

    def match(self, hashes: Sequence[int]) -> dict[EndpointName, int]:
        names = self._names
        return {names[number]: blocks for number, blocks in self._core.matches(hashes)}

    def record(self, endpoint: EndpointName, hashes: Sequence[int], capacity_blocks: int) -> None:
        number = self._numbers.get(endpoint)
        if number is None:
            number = self._numbers[endpoint] = next(free for free in count() if free not in self._names)
            self._names[number] = endpoint
        self._core.record(number, hashes, capacity_blocks)

    def keep(self, endpoints: Container[EndpointName]) -> None:
        for endpoint in [name for name in self._numbers if name not in endpoints]:
            number = self._numbers.pop(endpoint)
            del self._names[number]
            self._core.forget(number)

    def stats(self) -> HistoryStats:
        return HistoryStats(*self._core.stats())


def _find(name: str) -> Any:
    try:
        from kvatlas import _native
    except ImportError:
        return None
    return getattr(_native, name, None)


_History = _find("History")
_piece_hashes = _find("piece_hashes")


def _native_piece_hashes(content: memoryview, piece_bytes: int, root: int, added: Mapping[int, bytes]) -> array[int]:
    return array("Q", _piece_hashes(content, piece_bytes, root, added))


native_piece_hashes: PieceHashes | None = None if _piece_hashes is None else _native_piece_hashes
"""None where there is no native core."""
