"""Which index does the work: the native core where it is installed, else the Python reference, with the reason told."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal, cast

from kvatlas.errors import ConfigError
from kvatlas.index.protocol import Index, IndexLimits
from kvatlas.index.reference import ReferenceIndex
from kvatlas.keys import KeyRecipe, KeySchema

Core = Literal["auto", "native", "reference"]

RECORD = Path(__file__).parents[1] / "_native_missing.txt"
"""Where the build (hatch_build.py) says why it made no native core. There is no such file where it made one."""

REMEDY = (
    "install Rust 1.88 or newer (https://rustup.rs), then kvatlas once more: "
    "`KVATLAS_NATIVE=1 pip install --force-reinstall --no-cache-dir kvatlas` (in a checkout `.` for `kvatlas`)"
)
"""With KVATLAS_NATIVE=1 an installation without the native core fails and says all; pip would reuse a wheel that it keeps."""

NativeIndex = Callable[[KeyRecipe, IndexLimits, Callable[[], float]], Index]


def make_index(
    schema: KeyRecipe | None = None,
    limits: IndexLimits | None = None,
    clock: Callable[[], float] = time.monotonic,
    core: Core = "auto",
) -> Index:
    """Return an empty index. ``auto``: native where it is installed. ConfigError for ``native`` where it is not."""
    if core == "reference":
        return ReferenceIndex(schema, limits, clock)
    try:
        native = _native_index()
    except (ImportError, AttributeError):
        if core == "native":
            raise ConfigError(
                "index.core", f"the native core is missing: {why_no_native()}; {REMEDY}", "auto, reference"
            ) from None
        return ReferenceIndex(schema, limits, clock)
    return native(schema or KeySchema(), limits or IndexLimits(), clock)


def why_no_native(record: Path = RECORD) -> str | None:
    """Return why the native core cannot be used: "cargo was not found when kvatlas was installed". None where it can be."""
    try:
        _native_index()
    except (ImportError, AttributeError) as error:
        if not (isinstance(error, ModuleNotFoundError) and error.name == "kvatlas._native"):
            return f"it is there, but cannot be imported ({error})"
        try:
            return record.read_text(encoding="utf-8").strip()
        except OSError:
            return "nothing has built it here: kvatlas is not installed, only importable"
    return None


def native_version() -> str:
    """Return the version of the native core. ImportError where it is missing."""
    return cast(str, import_module("kvatlas._native").VERSION)


def describe_core(core: Core = "auto") -> str:
    """Return a line for people: what :func:`make_index` would return, and why it is not native where that was wanted."""
    if core == "reference":
        return "reference (pure Python), as index.core asks"
    missing = why_no_native()
    if missing is None:
        return f"native {native_version()} (Rust)"
    return f"reference (pure Python); the native core is missing: {missing}; {REMEDY}"


def _native_index() -> NativeIndex:
    import_module("kvatlas._native")  # first, so that where it is missing the error names it
    return cast(NativeIndex, import_module("kvatlas.index.native").NativeIndex)
