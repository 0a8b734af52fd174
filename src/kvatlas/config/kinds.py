"""Kinds of numbers that settings are, with what is allowed."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvatlas.config.quantities import Bytes, Seconds

Limit = Annotated[int, Meta(ge=1)]
Wait = Annotated[Seconds, Meta(gt=0)]
Capacity = Annotated[Bytes, Meta(ge=1024)]
Share = Annotated[float, Meta(ge=0, le=1)]
