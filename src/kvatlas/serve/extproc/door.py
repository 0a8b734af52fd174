"""One call of Envoy's: its messages to an exchange, what is to be decided to the dispatcher, answers back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError
from grpc import StatusCode
from prometheus_client import CollectorRegistry

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.errors import RequestError, RouteError, SaturatedError
from kvatlas.observe.logs import get_logger
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest
from kvatlas.serve.extproc.held import Room
from kvatlas.serve.extproc.messages import immediate
from kvatlas.serve.extproc.metrics import ExtProcMetrics
from kvatlas.serve.extproc.modes import ProtocolError
from kvatlas.serve.extproc.stream import Ask, Exchange, Limits, Replies
from kvatlas.serve.h2.calls import Call, Handler
from kvatlas.serve.routing.dispatch import Dispatcher
from kvatlas.serve.routing.refusals import refusal

_log = get_logger(__name__)


class Door:
    """Makes a handler for each call, and bounds how many there are."""

    def __init__(
        self,
        settings: ExtProcSettings,
        dispatcher: Dispatcher,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = Limits(settings.body_bytes_max, settings.headers_bytes_max)
        self.room = Room(settings.held_bytes_max)
        self.dispatcher = dispatcher
        self.metrics = ExtProcMetrics(registry, self.room)
        self.clock = clock
        self._streams_max = settings.streams_max
        self._open = 0

    def process(self, call: Call) -> Handler:
        """Serve ``ExternalProcessor.Process``: one HTTP request."""
        if self._open >= self._streams_max:
            return _Refused(call, self._streams_max, self.metrics)
        self._open += 1
        self.metrics.open.set(self._open)
        return _Process(call, self)

    def left(self, how: str) -> None:
        self._open -= 1
        self.metrics.open.set(self._open)
        self.metrics.ended(how)


class _Process:
    """The handler of one call."""

    def __init__(self, call: Call, door: Door) -> None:
        self._call = call
        self._door = door
        self._exchange = Exchange(door.limits, door.room, door.clock)
        self._deciding: asyncio.Task[None] | None = None
        self._how = "cancelled"

    def received(self, message: bytes) -> None:
        try:
            said = self._exchange.receive(ProcessingRequest.FromString(message))
        except DecodeError:
            self._fail("this is no ProcessingRequest")
        except ProtocolError as error:
            self._fail(str(error))
        else:
            if not isinstance(said, Ask):
                self._say(said)
            elif said.body is None:
                self._say(self._decide_bare(said))
            else:
                self._call.pause()
                self._deciding = asyncio.create_task(self._decide(said, said.body))

    def half_closed(self) -> None:
        """Envoy has no more to tell: the client went away, or answers are not shown."""
        self._how = "envoy_closed"
        self._call.end()

    def closed(self) -> None:
        if self._deciding is not None:
            self._deciding.cancel()
        self._exchange.close()
        self._door.left(self._how)

    async def _decide(self, ask: Ask, body: bytes) -> None:
        try:
            replies = self._exchange.decided(await self._door.dispatcher.dispatch(ask.path, ask.headers, body, ask.subset))
        except Exception as error:
            replies = self._refused(error, ask.path)
        self._deciding = None
        self._say(replies)
        self._call.resume()

    def _decide_bare(self, ask: Ask) -> Replies:
        try:
            return self._exchange.decided(self._door.dispatcher.dispatch_bare(ask.path, ask.headers, ask.subset))
        except Exception as error:
            return self._refused(error, ask.path)

    def _refused(self, error: Exception, path: str) -> Replies:
        if not isinstance(error, RequestError | RouteError):
            _log.error("request not decided", path=path, exc_info=error)
        return self._exchange.refused(error)

    def _say(self, replies: Replies) -> None:
        for reply in replies:
            self._call.send(reply.SerializeToString())
        if self._exchange.over:
            self._how = "refused" if self._exchange.refusal else "done"
            self._call.end()

    def _fail(self, problem: str) -> None:
        self._how = "protocol_error"
        _log.warning("ext_proc stream refused", problem=problem)
        self._call.end(StatusCode.INVALID_ARGUMENT, problem)


class _Refused:
    """The handler of a call too many."""

    def __init__(self, call: Call, streams_max: int, metrics: ExtProcMetrics) -> None:
        self._call = call
        self._streams_max = streams_max
        self._metrics = metrics

    def received(self, _message: bytes) -> None:
        error = SaturatedError(f"{self._streams_max} requests are in progress")
        self._call.send(immediate(refusal(error)).SerializeToString())
        self._call.end()

    def half_closed(self) -> None:
        self._call.end()

    def closed(self) -> None:
        self._metrics.ended("refused")
