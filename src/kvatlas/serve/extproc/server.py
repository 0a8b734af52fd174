"""The gRPC servers: Envoy's calls on one port, health checks on that and another. What is said is decided in ``stream.py``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.errors import RequestError, RouteError, SaturatedError
from kvatlas.netloc import netloc
from kvatlas.observe.logs import get_logger
from kvatlas.proto.envoy.service.ext_proc.v3 import external_processor_pb2_grpc
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from kvatlas.serve.extproc.held import Room
from kvatlas.serve.extproc.messages import immediate
from kvatlas.serve.extproc.metrics import ExtProcMetrics
from kvatlas.serve.extproc.modes import ProtocolError
from kvatlas.serve.extproc.stream import Ask, Exchange, Limits, Replies
from kvatlas.serve.grpc import server_credentials, take_port
from kvatlas.serve.routing.dispatch import Dispatcher
from kvatlas.serve.routing.refusals import refusal

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
LIVENESS = "liveness"
READINESS = ("", "readiness", SERVICE)
MESSAGE_BYTES_SPARE = 1 << 20
"""What a message may hold beside a whole body."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Context = grpc.aio.ServicerContext[ProcessingRequest, ProcessingResponse]

_log = get_logger(__name__)


class ExternalProcessor(external_processor_pb2_grpc.ExternalProcessorServicer):
    """Carries messages between Envoy, an exchange for each stream, and the dispatcher."""

    def __init__(
        self,
        settings: ExtProcSettings,
        dispatcher: Dispatcher,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = Limits(settings.body_bytes_max, settings.headers_bytes_max)
        self._streams_max = settings.streams_max
        self._room = Room(settings.held_bytes_max)
        self._dispatcher = dispatcher
        self._metrics = ExtProcMetrics(registry, self._room)
        self._clock = clock
        self._open = 0

    async def Process(self, _requests: Any, context: Context) -> None:  # type: ignore[override]  # noqa: N802  # gRPC's name
        """Serve one HTTP request."""
        if self._open >= self._streams_max:
            await context.write(immediate(refusal(SaturatedError(f"{self._streams_max} requests are in progress"))))
            self._metrics.ended("refused")
            return
        self._open += 1
        self._metrics.open.set(self._open)
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
            self._metrics.open.set(self._open)
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
                said = await self._decide(exchange, said)
            for reply in said:
                await context.write(reply)

    async def _decide(self, exchange: Exchange, ask: Ask) -> Replies:
        try:
            if ask.body is None:
                return exchange.decided(self._dispatcher.dispatch_bare(ask.path, ask.headers, ask.subset))
            return exchange.decided(await self._dispatcher.dispatch(ask.path, ask.headers, ask.body, ask.subset))
        except (RequestError, RouteError) as error:
            return exchange.refused(error)
        except Exception as error:
            _log.exception("request not decided", path=ask.path)
            return exchange.refused(error)


class ExtProcServer:
    """Both ports. Must be made in the event loop that it runs in."""

    def __init__(self, settings: ExtProcSettings, dispatcher: Dispatcher, registry: CollectorRegistry) -> None:
        self._settings = settings
        self._health = health.aio.HealthServicer()
        self._picker = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.body_bytes_max + MESSAGE_BYTES_SPARE),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", 16 << 10),
                ("grpc.so_reuseport", 0),  # else a second picker on the port would take half of the streams, unnoticed
            ]
        )
        processor = ExternalProcessor(settings, dispatcher, registry)
        external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(processor, self._picker)
        self._checks = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        for server in (self._picker, self._checks):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    def bind(self) -> tuple[int, int]:
        """Take both ports and return them. Raises ConfigError where one cannot be had."""
        settings = self._settings
        credentials = server_credentials("extProc", settings.tls_cert_file, settings.tls_key_file)
        port = take_port(self._picker, "extProc.port", netloc(settings.host, settings.port), credentials)
        health = netloc(settings.host, settings.health_port)
        return port, take_port(self._checks, "extProc.healthPort", health, None)

    async def start(self) -> None:
        """Begin to serve. Not ready until :meth:`set_ready`."""
        await self._health.set(LIVENESS, _SERVING)
        await self.set_ready(False)
        await self._picker.start()
        await self._checks.start()

    async def set_ready(self, ready: bool) -> None:
        """Let health checks say whether requests should be sent here."""
        for name in READINESS:
            await self._health.set(name, _SERVING if ready else _NOT_SERVING)

    async def drain(self) -> None:
        """Say that it stops, and go on for as long as Envoy may take to know."""
        await self.set_ready(False)
        await asyncio.sleep(self._settings.drain_delay)

    async def stop(self, grace_s: float | None = None) -> None:
        """Let requests in progress finish within the grace (extProc.shutdownGrace), then cut them off."""
        await self._picker.stop(self._settings.shutdown_grace if grace_s is None else grace_s)
        await self._checks.stop(None)
