"""The proxy's HTTP in Rust (``native/http``): connections and bytes are threads' of the native core, decisions are ours.

They tell what happens through a mailbox, so that one wake-up of the event loop serves all requests that wait for it, and an
answer passes from engine to client without waking anybody here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from kvatlas import _native
from kvatlas.config.proxy import ProxySettings
from kvatlas.mail import Mail
from kvatlas.netloc import netloc
from kvatlas.route.endpoint import Endpoint
from kvatlas.serve.listening import resolve, taken
from kvatlas.serve.proxy.call import Handle, Passed, PassEnd, Sent, Watcher
from kvatlas.serve.proxy.errors import BodyFault, Break, UpstreamError
from kvatlas.serve.proxy.headers import DROPPED_OF_ANSWERS, DROPPED_OF_REQUESTS
from kvatlas.serve.routing.answers import said_done_in, usage_in

CUT_S = 2.0
"""For requests that are cut to end."""

_ENDS = {end.value: end for end in PassEnd}


class NativeStack:
    """A Stack."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self._door: _native.Door | None = None
        self._mail: Mail | None = None
        self._handle: Handle | None = None
        self._calls: dict[int, NativeCall] = {}
        self._fetches: dict[int, asyncio.Future[Any]] = {}
        self._all_idle = asyncio.Event()
        self.url = ""

    async def start(self, handle: Handle) -> None:
        settings = self._settings
        _, address = await asyncio.to_thread(resolve, "proxy", settings.host, settings.port)
        self._handle = handle
        mail = self._mail = Mail(_native.Mailbox())
        authorization = ["authorization"] if settings.token is not None or settings.engine_token is not None else []
        times = (
            settings.client_timeout,
            settings.keep_alive,
            settings.connect_timeout,
            settings.first_byte_timeout,
            settings.idle_timeout,
            settings.engine_keep_alive,
        )
        try:
            self._door = _native.Door(
                str(address[0]),
                settings.port,
                settings.reuse_port,
                settings.threads,
                settings.connections_max,
                settings.engine_connections_max,
                times,
                ([*DROPPED_OF_REQUESTS, *authorization], [*DROPPED_OF_ANSWERS]),
                mail.mailbox,
                mail.ticket(self._read),
            )
        except OSError as error:
            mail.close()
            raise taken("proxy", settings.host, settings.port, error) from None
        self.url = f"http://{netloc(*self._door.address())}"

    async def stop(self, grace_s: float) -> None:
        if self._door is None or self._mail is None:
            return
        self._door.stop_accepting()
        self._mail.read()  # what has arrived counts
        await self._idle(grace_s)
        for call in list(self._calls.values()):
            call.cut()
        await self._idle(CUT_S)
        await asyncio.to_thread(self._door.close)
        self._mail.read()
        self._mail.close()

    async def fetch(self, endpoint: Endpoint, target: str, headers: Mapping[str, str], bytes_max: int) -> tuple[int, bytes]:
        assert self._door is not None
        if endpoint.tls:
            raise _no_tls()
        number = self._door.fetch(endpoint.authority, target, list(headers.items()), bytes_max)
        future = self._fetches[number] = asyncio.get_running_loop().create_future()
        try:
            status, body = await future
        finally:
            del self._fetches[number]
        return status, body

    def _read(self, letter: Any) -> None:
        number, kind, *told = letter
        if kind == "arrived":
            self._begin(number, *told)
        elif (call := self._calls.get(number)) is not None:
            call.hear(kind, told)
        elif (fetch := self._fetches.get(number)) is not None and not fetch.done():
            if kind == "fetched":
                fetch.set_result(told)
            else:
                fetch.set_exception(_upstream_error(*told[0]))

    def _begin(
        self,
        number: int,
        native: _native.Call,
        asked: tuple[str, str, dict[str, str]],
        body: bytes | None,
        fault: str | None,
        ambiguous: bool,
    ) -> None:
        call = self._calls[number] = NativeCall(native, asked, body, fault, ambiguous)
        call.task = asyncio.get_running_loop().create_task(self._answer(call))
        call.task.add_done_callback(lambda _: self._end(number))  # also of a task that was cancelled before its first step

    async def _answer(self, call: NativeCall) -> None:
        assert self._handle is not None
        reply = await self._handle(call)
        if reply is not None:
            call.native.respond(reply.status, list(reply.headers.items()), reply.body, reply.close)

    def _end(self, number: int) -> None:
        del self._calls[number]
        if not self._calls:
            self._all_idle.set()

    async def _idle(self, limit_s: float) -> None:
        """Return when no request is in progress, or the time is over."""
        if self._calls:
            self._all_idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_idle.wait(), limit_s)


class NativeCall:
    """A ClientCall."""

    def __init__(
        self,
        native: _native.Call,
        asked: tuple[str, str, dict[str, str]],
        body: bytes | None,
        fault: str | None,
        ambiguous: bool,
    ) -> None:
        self.native = native
        self.method, target, self.headers = asked
        self.path, _, self.query = target.partition("?")
        self.problem = "it has both Content-Length and Transfer-Encoding" if ambiguous else None
        self.task: asyncio.Task[None] | None = None
        self._body = body
        self._fault = fault
        self._letters: list[tuple[str, Any]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._watcher: Watcher | None = None

    def hear(self, kind: str, told: Any) -> None:
        """Take a letter: those that nobody waits for are acted on at once."""
        if kind == "gone":
            if self.task is not None:
                self.task.cancel()
        elif kind == "first_token":
            if self._watcher is not None:
                self._watcher.first_token(told[0])
        else:
            self._letters.append((kind, told))
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)

    async def body(self, bytes_max: int) -> bytes:
        if self._body is None and self._fault is None:
            self.native.read(bytes_max)
            _, (self._body, self._fault) = await self._next()
        if self._fault is None and self._body is not None and len(self._body) > bytes_max:
            self._fault = "too_large"
        if self._fault is not None:
            raise BodyFault(self._fault).error(bytes_max)
        assert self._body is not None
        return self._body

    async def forward(self, sent: Sent, watcher: Watcher) -> Passed | None:
        if sent.endpoint.tls:
            raise _no_tls()
        self._watcher = watcher
        body = None if sent.body is self._body else sent.body
        routing, reply = list(sent.routing.items()), list(sent.reply.items())
        self.native.forward(sent.endpoint.authority, sent.target, routing, body, reply, list(sent.hidden))
        kind, told = await self._next()
        if kind == "failed":
            raise _upstream_error(*told[0])
        status, headers, passing = told
        watcher.answered(status, headers)
        return await self._passed() if passing else None

    async def pass_held(self) -> Passed:
        self.native.pass_on()
        return await self._passed()

    def cut(self) -> None:
        self.native.cut()

    async def _passed(self) -> Passed:
        _, (end, tail, took_s) = await self._next()
        return Passed(_ENDS[end], usage_in(tail), said_done_in(tail), took_s)

    async def _next(self) -> tuple[str, Any]:
        if not self._letters:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._letters.pop(0)


def _upstream_error(how: str, problem: str) -> UpstreamError:
    return UpstreamError(Break(how), problem)


def _no_tls() -> UpstreamError:
    return UpstreamError(Break.NO_CONNECTION, "it wants TLS, which the native stack does not speak (set proxy.stack to python)")
