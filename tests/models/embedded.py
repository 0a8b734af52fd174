"""Embedded engines within a test's event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache

import httpx

from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec
from kvatlas.sim.live.server import EngineOptions, RunningEngine, load_tokens, running
from kvatlas.sim.live.tokens import EngineTokens

QUICK = EngineSpec(costs=EngineCosts(step_s=0.001, prefill_token_s=0.00001), gpu_blocks=256)


@cache
def tokens() -> EngineTokens:
    """Return the packaged tokenizer, loaded once a process."""
    return load_tokens(EngineOptions())


@asynccontextmanager
async def embedded(spec: EngineSpec = QUICK, **options: object) -> AsyncIterator[tuple[RunningEngine, httpx.AsyncClient]]:
    """Run an engine for as long as the block lasts, with a client of its API."""
    async with (
        running(spec, EngineOptions(**options), tokens()) as engine,  # type: ignore[arg-type]
        httpx.AsyncClient(base_url=engine.started.url, timeout=60, trust_env=False) as client,
    ):
        yield engine, client
