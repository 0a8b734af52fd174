"""Follows a kind of Kubernetes objects: list, then watch, and list again where the watch expired or failed."""

from __future__ import annotations

import asyncio
import random as random_module
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
import msgspec

from kvatlas.discovery.endpoints import ENDPOINTS_MAX

WATCH_S = 300
"""How long the server keeps a watch open before it is asked for again."""

PAGE_OBJECTS = 500
RETRY_MIN_S = 0.25
GONE = 410

List = Callable[..., Awaitable[aiohttp.ClientResponse]]
"""A list call of the Kubernetes client, with all but its options filled in."""

Objects = Mapping[str, Any]
"""By name."""


class ApiError(Exception):
    """The API server refused, or said what makes no sense."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        super().__init__(f"the API server answers {status}: {detail}"[:300])


class Follower:
    """Tells all objects whenever one has changed. After a failure they stay as they were, until a list succeeds again."""

    def __init__(
        self,
        list_objects: List,
        *,
        options: Mapping[str, str],
        retry_max_s: float,
        failed: Callable[[str], None],
        recovered: Callable[[], None],
        random: random_module.Random,
        unknown_ends: bool = False,
    ) -> None:
        """``failed``: told what is wrong, at each attempt; ``recovered``: at each list that succeeded.

        ``unknown_ends``: :meth:`run` ends where the server does not know the kind (404).
        """
        self._list_objects = list_objects
        self._options = options
        self._retry_max_s = retry_max_s
        self._failed = failed
        self._recovered = recovered
        self._random = random
        self._unknown_ends = unknown_ends
        self._objects: dict[str, Any] = {}

    async def run(self, changed: Callable[[Objects], None]) -> None:
        """Follow until cancelled, or until the kind is unknown."""
        retry_s = RETRY_MIN_S
        while True:
            try:
                version = await self._list()
                self._recovered()
                changed(self._objects)
                retry_s = RETRY_MIN_S
                await self._watch(version, changed)
            except ApiError as error:
                self._failed(str(error))
                if error.status == 404 and self._unknown_ends:
                    return
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
                self._failed(f"{type(error).__name__}: {error}"[:300])
            await asyncio.sleep(retry_s * self._random.uniform(0.5, 1.0))
            retry_s = min(self._retry_max_s, retry_s * 2)

    async def _list(self) -> str:
        """Replace all objects. Returns the version that they are of."""
        objects: dict[str, Any] = {}
        options: dict[str, Any] = {**self._options, "limit": PAGE_OBJECTS}
        while True:
            timeout = aiohttp.ClientTimeout(total=60, sock_connect=10)
            answer = await self._list_objects(**options, _preload_content=False, _request_timeout=timeout)
            async with answer:
                if answer.status != 200:
                    raise ApiError(answer.status, answer.reason or "")
                page = msgspec.json.decode(await answer.read(), type=_Page)
            for item in page.items or ():
                objects[_metadata(item, "name")] = item
            if len(objects) > ENDPOINTS_MAX:
                raise ApiError(200, f"more than {ENDPOINTS_MAX} objects")
            if not page.metadata.get("continue"):
                self._objects = objects
                return str(page.metadata.get("resourceVersion", ""))
            options["_continue"] = page.metadata["continue"]

    async def _watch(self, version: str, changed: Callable[[Objects], None]) -> None:
        """Follow changes from a version on; returns where that has become too old."""
        while True:
            began_s = time.monotonic()
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=WATCH_S + 30)
            answer = await self._list_objects(
                **self._options,
                watch=True,
                resource_version=version,
                allow_watch_bookmarks=True,
                timeout_seconds=WATCH_S,
                _preload_content=False,
                _request_timeout=timeout,
            )
            async with answer:
                if answer.status == GONE:
                    return
                if answer.status != 200:
                    raise ApiError(answer.status, answer.reason or "")
                while line := await answer.content.readline():
                    event = msgspec.json.decode(line, type=_Event)
                    if event.type == "ERROR":
                        if event.object.get("code") == GONE:
                            return
                        raise ApiError(event.object.get("code", 0), str(event.object.get("message")))
                    version = _metadata(event.object, "resourceVersion")
                    if self._apply(event):
                        changed(self._objects)
            if time.monotonic() - began_s < 1.0:
                raise ApiError(200, "watches end as soon as they begin")

    def _apply(self, event: _Event) -> bool:
        """Take in an event. Returns whether objects changed."""
        if event.type == "DELETED":
            return self._objects.pop(_metadata(event.object, "name"), None) is not None
        if event.type in ("ADDED", "MODIFIED"):
            self._objects[_metadata(event.object, "name")] = event.object
            return True
        return False


class _Event(msgspec.Struct):
    type: str
    object: dict[str, Any]


class _Page(msgspec.Struct):
    items: list[dict[str, Any]] | None = None
    metadata: dict[str, Any] = {}


def _metadata(item: Mapping[str, Any], field: str) -> str:
    metadata = item.get("metadata")
    value = metadata.get(field) if isinstance(metadata, dict) else None
    if not isinstance(value, str):
        raise ApiError(200, f"an object without metadata.{field}")
    return value
