"""The demo's users: each sends one chat after the other, and notes how it went."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgspec

from kvatlas.demo.fleet import MODEL, Router
from kvatlas.demo.processes import DemoError
from kvatlas.demo.trace import Chat

PAUSE_S = 0.3
"""Between an answer and a user's next request, on average."""
TURNS_MAX = 20
"""Of a session; later ones are left out, so that every run sees many sessions."""
REQUEST_S_MAX = 60.0
TRIES_MAX = 3
"""Of a request whose answer was cut off."""
DECISION_TRIES = 20


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """One request, from its first try to its answer."""

    at_s: float
    """When it was sent, on the clock of time.monotonic."""
    engine: str = ""
    """Who answered it."""
    prompt: tuple[int, ...] = ()
    """Its tokens, as the engine told them."""
    cached_tokens: int = 0
    """As the engine told."""
    ttft_s: float = 0.0
    predicted_tokens: int | None = None
    """What the router read in events before it was sent; None: its engine had published nothing yet, or was not asked."""
    moved: bool = False
    """The router sent it to another engine, because the first one did not answer."""
    cut: int = 0
    """So many answers broke off before this one."""
    problem: str | None = None
    """Why it was not answered."""


class _Cut(Exception):  # noqa: N818  no failure: the engine went, and the request is sent again
    """An answer that broke off."""


class _Failed(Exception):  # noqa: N818
    """A request that was not answered."""


class Traffic:
    """So many users. ``told``: called with each request when it is over."""

    def __init__(self, router: Router, sessions: Iterator[tuple[Chat, ...]], seed: int, told: Callable[[Sent], None]) -> None:
        self._router = router
        self._sessions = sessions
        self._random = random.Random(seed)  # noqa: S311  not for secrets
        self._told = told
        self._ending = False
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=REQUEST_S_MAX, trust_env=False, limits=limits)

    async def run(self, users: int) -> None:
        """Send until :meth:`end`, and until what is under way then is answered. DemoError where the router's API fails."""
        async with self._client:
            tasks = [asyncio.create_task(self._user()) for _ in range(users)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    def end(self) -> None:
        """Send nothing more."""
        self._ending = True

    async def _user(self) -> None:
        while not self._ending:
            for chat in next(self._sessions)[:TURNS_MAX]:
                await asyncio.sleep(self._random.expovariate(1 / PAUSE_S))
                if self._ending:
                    return
                self._told(await self._ask(chat))

    async def _ask(self, chat: Chat) -> Sent:
        sent = Sent(at_s=time.monotonic())
        for cut in range(TRIES_MAX):
            request_id = uuid.uuid4().hex
            try:
                sent = msgspec.structs.replace(sent, **await self._answer(chat, request_id), cut=cut)
            except _Cut:
                continue
            except _Failed as failure:
                return msgspec.structs.replace(sent, problem=str(failure), cut=cut)
            return await self._with_decision(sent, request_id)
        return msgspec.structs.replace(sent, problem=f"{TRIES_MAX} answers were cut off", cut=TRIES_MAX)

    async def _answer(self, chat: Chat, request_id: str) -> dict[str, Any]:
        """Send a request once; return what its answer said."""
        options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        body, headers = {**chat.body(MODEL), **options}, {"x-request-id": request_id}
        found: dict[str, Any] = {}
        began_s = time.perf_counter()
        begun = False
        try:
            url = f"{self._router.proxy}/v1/chat/completions"
            async with self._client.stream("POST", url, json=body, headers=headers) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise _Failed(f"{answer.status_code}: {(await answer.aread())[:300]!r}")
                begun = True
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        return found
                    if line.startswith("data: "):
                        _read(msgspec.json.decode(line[6:]), found, time.perf_counter() - began_s)
        except httpx.HTTPError as error:
            if not begun:
                raise _Failed(repr(error)) from error
        raise _Cut

    async def _with_decision(self, sent: Sent, request_id: str) -> Sent:
        """Add what the router said of it. It notes the end of an answer a moment after the client saw it."""
        for _ in range(DECISION_TRIES):
            try:
                answer = await self._client.get(f"{self._router.api}/v1/decisions", params={"id": request_id})
                decision = answer.raise_for_status().json()["decisions"][0]
            except httpx.HTTPError as error:
                raise DemoError(f"the router's API does not say what it decided: {error!r}") from error
            if decision["outcome"].get("end"):
                break
            await asyncio.sleep(0.01)
        moved = decision["outcome"].get("sent_to_instead", [])
        told = not moved and _matched_by(decision) == "events"
        return msgspec.structs.replace(
            sent,
            engine=(moved or [decision["endpoint"]])[-1].rpartition("/")[2],
            moved=bool(moved),
            predicted_tokens=decision["predicted_cached_tokens"] if told else None,
        )


def _matched_by(decision: dict[str, Any]) -> str:
    """Return how the router knew what the engine that it picked held."""
    (picked,) = (one for profile in decision["profiles"] for one in profile["candidates"] if one["picked"])
    return str(picked["match"]["matched_by"])


def _read(event: dict[str, Any], found: dict[str, Any], after_s: float) -> None:
    """Take from an event of a stream what counts. Raises _Cut for one that says that the answer breaks off."""
    if "error" in event:
        raise _Cut
    if "prompt_token_ids" in event:
        found["prompt"] = tuple(event["prompt_token_ids"])
    if any(choice["delta"].get("content") for choice in event["choices"]):
        found.setdefault("ttft_s", after_s)
    usage = event.get("usage")
    if usage:
        found["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
