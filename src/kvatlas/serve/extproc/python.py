"""The endpoint picker's gRPC in Python (grpc.aio). What is said is decided in ``stream.py``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.errors import SaturatedError
from kvatlas.netloc import netloc
from kvatlas.observe.logs import get_logger
from kvatlas.proto.envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from kvatlas.serve.extproc.decide import decide
from kvatlas.serve.extproc.health import HealthChecks
from kvatlas.serve.extproc.held import Room
from kvatlas.serve.extproc.messages import immediate
from kvatlas.serve.extproc.metrics import ExtProcMetrics
from kvatlas.serve.extproc.modes import ProtocolError
from kvatlas.serve.extproc.stream import Ask, Exchange, Limits
from kvatlas.serve.grpc import server_credentials, take_port
from kvatlas.serve.routing.dispatch import Dispatcher, Trip
from kvatlas.serve.routing.refusals import refusal

MESSAGE_BYTES_SPARE = 1 << 20
"""What a message may hold beside a whole body."""

Context = grpc.aio.ServicerContext[ProcessingRequest, ProcessingResponse]

_log = get_logger(__name__)


class ExternalProcessor(external_processor_pb2_grpc.ExternalProcessorServicer):
    """Carries messages between Envoy, an exchange for each stream, and the dispatcher."""

    def __init__(
        self,
        settings: ExtProcSettings,
        dispatcher: Dispatcher,
        metrics: ExtProcMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = Limits(settings.body_bytes_max, settings.headers_bytes_max)
        self._streams_max = settings.streams_max
        self._room = Room(settings.held_bytes_max)
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._clock = clock
        self._open = 0
        metrics.observe(lambda: self._open, lambda: self._room.used_bytes)

    async def Process(self, _requests: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802  # gRPC's name
        """Serve one HTTP request."""
        if self._open >= self._streams_max:
            await context.write(immediate(refusal(SaturatedError(f"{self._streams_max} requests are in progress"))))
            self._metrics.ended("refused")
            return
        self._open += 1
        exchange = Exchange(self._limits, self._room, self._clock)
        how = "failed"
        try:
            await self._serve(exchange, context)
            how = "refused" if exchange.refusal else "done" if exchange.over else "envoy_closed"
        except ProtocolError as error:
            how = "protocol_error"
            _log.warning("ext_proc stream refused", problem=str(error))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            how = "cancelled"
            raise
        finally:
            exchange.close()
            self._open -= 1
            self._metrics.ended(how)

    async def _serve(self, exchange: Exchange, context: Context) -> None:
        while not exchange.over:
            try:
                message = await context.read()
            except DecodeError:
                raise ProtocolError("this is no ProcessingRequest") from None
            if not isinstance(message, ProcessingRequest):
                return  # Envoy has no more to tell
            said = exchange.receive(message)
            if isinstance(said, Ask):
                decided = await decide(self._dispatcher, said)
                said = exchange.decided(decided) if isinstance(decided, Trip) else exchange.refused(decided)
            for reply in said:
                await context.write(reply)


class PythonStack:
    """A Stack."""

    def __init__(self, settings: ExtProcSettings, dispatcher: Dispatcher, metrics: ExtProcMetrics) -> None:
        self._settings = settings
        self._health = HealthChecks()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.body_bytes_max + MESSAGE_BYTES_SPARE),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", 16 << 10),
                ("grpc.so_reuseport", 0),  # else a second picker on the port would take half of the streams, unnoticed
            ]
        )
        processor = ExternalProcessor(settings, dispatcher, metrics)
        external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(processor, self._server)
        self._health.add_to(self._server)

    def bind(self) -> int:
        settings = self._settings
        credentials = server_credentials("extProc", settings.tls_cert_file, settings.tls_key_file)
        return take_port(self._server, "extProc.port", netloc(settings.host, settings.port), credentials)

    async def start(self) -> None:
        await self._health.start()
        await self._server.start()

    async def set_ready(self, ready: bool) -> None:
        await self._health.set_ready(ready)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
