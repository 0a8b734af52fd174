"""Waiting for tokens in an event loop."""

from __future__ import annotations

import asyncio
from array import array
from concurrent.futures import Future

import pytest

from kvatlas.tokens.pending import PendingTokens
from kvatlas.tokens.results import Tokenized, TokenSource

TOKENIZED = Tokenized(token_ids=array("I", [1]), source=TokenSource.LOCAL, tokenizer="tiny")


@pytest.mark.parametrize("turns", range(8))
async def test_who_is_cancelled_just_as_the_tokens_come_is_cancelled(turns: int) -> None:
    """A client that went away is waited for by nobody: its request must not go on."""
    first: Future[Tokenized] = Future()
    waiting = asyncio.create_task(PendingTokens(first, 60.0, lambda _error: None).wait())
    await asyncio.sleep(0)
    first.set_result(TOKENIZED)
    for _ in range(turns):
        await asyncio.sleep(0)
    if waiting.cancel():
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        assert waiting.result() is TOKENIZED
