"""Which engines do the work: native ones where the native core is installed, else those in Python, with the reason told."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from kvatlas.errors import ConfigError
from kvatlas.index.choice import REMEDY, Core, describe_core, why_no_native
from kvatlas.sim.engines import Engines
from kvatlas.sim.reference import ReferenceEngines


def make_engines(core: Core = "auto") -> Engines:
    """Return a virtual clock without engines. ``auto``: native where it is installed. ConfigError for ``native`` where not."""
    if core == "reference":
        return ReferenceEngines()
    try:
        return cast(Engines, import_module("kvatlas.sim.native").NativeEngines())
    except ImportError:
        if core == "native":
            raise ConfigError("core", f"the native core is missing: {why_no_native()}; {REMEDY}", "auto, reference") from None
        return ReferenceEngines()


__all__ = ["Core", "describe_core", "make_engines", "why_no_native"]
