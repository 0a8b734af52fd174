"""Endpoints that are known at the start and stay: from flags or settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvatlas.route.endpoint import Endpoint


class StaticDiscovery:
    """Tells the endpoints that it was given, once."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = tuple(endpoints)

    async def run(self, changed: Callable[[Sequence[Endpoint]], None]) -> None:
        """Tell them, and wait to be cancelled."""
        changed(self._endpoints)
        await asyncio.Event().wait()
