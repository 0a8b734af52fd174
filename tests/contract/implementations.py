"""Every index implementation. A new one joins here, and with that all contract and property tests."""

from __future__ import annotations

from collections.abc import Callable

from kvatlas.index import Index, IndexLimits, ReferenceIndex
from kvatlas.keys import KeySchema

MakeIndex = Callable[[KeySchema, IndexLimits, Callable[[], float]], Index]

IMPLEMENTATIONS: dict[str, MakeIndex] = {"reference": ReferenceIndex}

try:
    from kvatlas.index.native import NativeIndex
except ImportError:
    pass  # an installation without cargo; `kvatlas doctor` says so
else:
    IMPLEMENTATIONS["native"] = NativeIndex
