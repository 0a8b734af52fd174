"""What carries a front door's connections: threads of the native core, or Python."""

from __future__ import annotations

from typing import Literal

from kvatlas.errors import ConfigError
from kvatlas.index.choice import REMEDY, why_no_native

Asked = Literal["auto", "native", "python"]


def is_native(section: str, asked: Asked, *, tls: bool) -> bool:
    """Say which one a section's setting ``stack`` asks for: ``auto`` is native, unless that is missing or TLS is asked for.

    Raises ConfigError for ``native`` where it cannot be.
    """
    missing = why_no_native()
    if asked == "native" and missing is not None:
        raise ConfigError(f"{section}.stack", f"the native core is missing: {missing}; {REMEDY}", "auto, python")
    if asked == "native" and tls:
        raise ConfigError(f"{section}.stack", "the native stack does not speak TLS", "auto, python")
    return asked != "python" and missing is None and not tls
