"""What runs beside a test, and files that it follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run until the block ends; it must not end by itself."""
    task = asyncio.create_task(work)
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def write_at_once(path: Path, text: str) -> None:
    """Write a file so that nothing in between can be seen."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)
