"""The gRPC server against a real client, grpc's own: messages of any size both ways, failures, TLS, draining."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.errors import ConfigError
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, ProcessingRequest, ProcessingResponse
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from kvatlas.serve.h2.calls import Bounds, Call, Handler
from kvatlas.serve.h2.health import Health
from kvatlas.serve.h2.server import GrpcServer
from tests.models.picker import Picker, picker

ECHO = "/test.Echo/Echo"


class Echo:
    """Sends back what comes, until the client ends."""

    def __init__(self, call: Call, closed: list[str]) -> None:
        self.call = call
        self._closed = closed

    def received(self, message: bytes) -> None:
        if message == b"fail":
            self.call.end(grpc.StatusCode.DATA_LOSS, "as asked: 100 %\nünd")
        else:
            self.call.send(message)

    def half_closed(self) -> None:
        self.call.end()

    def closed(self) -> None:
        self._closed.append("closed")


@asynccontextmanager
async def serving(
    bounds: Bounds = Bounds(streams_max=200, message_bytes_max=8 << 20),  # noqa: B008  # frozen
    method: Callable[[Call], Handler] | None = None,
) -> AsyncIterator[tuple[GrpcServer, str, list[str]]]:
    closed: list[str] = []
    server = GrpcServer({ECHO: method or (lambda call: Echo(call, closed))}, bounds, connections_max=4)
    address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    await server.start()
    try:
        yield server, address, closed
    finally:
        await server.stop(0.0)


@asynccontextmanager
async def client(address: str, **options: Any) -> AsyncIterator[grpc.aio.StreamStreamMultiCallable[bytes, bytes]]:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=unlimited, **options) as channel:
        yield channel.stream_stream(ECHO)


async def test_messages_of_any_size_go_both_ways() -> None:
    messages = [b"", b"x", b"y" * 16_384, b"z" * 70_000, b"w" * (5 << 20), b"end"]
    async with serving() as (_, address, closed), client(address) as echo:
        assert [message async for message in echo(iter_of(messages))] == messages
        assert closed == ["closed"]


async def test_many_calls_at_a_time_do_not_mix() -> None:
    async with serving() as (_, address, closed), client(address) as echo:

        async def one(number: int) -> None:
            messages = [b"%d-%d" % (number, part) * 3000 for part in range(5)]
            assert [message async for message in echo(iter_of(messages))] == messages

        await asyncio.gather(*(one(number) for number in range(100)))
        assert len(closed) == 100


async def test_a_failure_has_its_status_and_text() -> None:
    async with serving() as (_, address, closed), client(address) as echo:
        error = await failure(echo(), b"fail")
        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert error.details() == "as asked: 100 %\nünd"
        assert closed == ["closed"]
        assert [message async for message in echo(iter_of([b"still there"]))] == [b"still there"]


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving() as (_, address, _), grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await channel.unary_unary("/test.Echo/Other")(b"")
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_over_the_limit_and_a_compressed_one_are_refused() -> None:
    async with serving(Bounds(streams_max=5, message_bytes_max=1000)) as (_, address, _):
        async with client(address) as echo:
            assert (await failure(echo(), b"x" * 1001)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with client(address, compression=grpc.Compression.Gzip) as echo:
            assert (await failure(echo(), b"x" * 900)).code() is grpc.StatusCode.UNIMPLEMENTED


async def failure(call: Any, message: bytes) -> grpc.aio.AioRpcError:
    await call.write(message)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call.read()
    return failed.value


async def test_a_call_that_its_client_cancels_is_over() -> None:
    over = asyncio.Event()

    class Waits(Echo):
        def closed(self) -> None:
            over.set()

    async with serving(method=lambda call: Waits(call, [])) as (_, address, _), client(address) as echo:
        call = echo()
        await call.write(b"hello")
        assert await call.read() == b"hello"
        call.cancel()
        await asyncio.wait_for(over.wait(), 20)


async def test_a_handler_that_pauses_gets_no_more_and_its_client_cannot_send_without_end() -> None:
    paused: asyncio.Future[Call] = asyncio.get_running_loop().create_future()
    got: list[int] = []

    class Pauses(Echo):
        def received(self, message: bytes) -> None:
            got.append(len(message))
            if not paused.done():
                paused.set_result(self.call)
                self.call.pause()

    async with serving(method=lambda call: Pauses(call, [])) as (_, address, _), client(address) as echo:
        call = echo()
        sending = asyncio.create_task(write_all(call, [b"y" * 900_000] * 10))
        waiting = await asyncio.wait_for(paused, 20)
        await asyncio.wait({sending}, timeout=0.3)
        assert not sending.done()
        assert len(got) == 1
        waiting.resume()
        await asyncio.wait_for(sending, 20)
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF
        assert got == [900_000] * 10


async def write_all(call: Any, messages: list[bytes]) -> None:
    for message in messages:
        await call.write(message)


async def test_a_server_that_stops_lets_calls_finish_and_takes_no_new_connection() -> None:
    async with serving() as (server, address, closed), client(address) as echo:
        call = echo()
        await call.write(b"one")
        assert await call.read() == b"one"
        stopping = asyncio.create_task(server.stop(20.0))
        await call.write(b"two")
        assert await call.read() == b"two"
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address.split(":"))
        assert not stopping.done()
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF
        await asyncio.wait_for(stopping, 20)
        assert closed == ["closed"]


async def test_a_server_that_stops_cuts_off_what_outlives_the_grace() -> None:
    async with serving() as (server, address, closed), client(address) as echo:
        call = echo()
        await call.write(b"one")
        assert await call.read() == b"one"
        await server.stop(0.05)
        assert closed == ["closed"]
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_connections_beyond_the_bound_and_those_that_speak_no_http2_are_closed() -> None:
    async with serving() as (_, address, _):
        host, port = address.split(":")
        connections = [await asyncio.open_connection(host, port) for _ in range(4)]
        for reader, _ in connections:
            assert await reader.read(9)
        reader, _ = await asyncio.open_connection(host, port)
        assert await asyncio.wait_for(reader.read(), 20) == b""
        reader, writer = connections[0]
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert b"no HTTP/2" in await asyncio.wait_for(reader.read(), 20)
        for _, writer in connections:
            writer.close()


async def test_health_is_watched_and_checked() -> None:
    health = Health()
    health.set("a", True)
    server = GrpcServer(health.methods, Bounds(10, 1000), 4)
    address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="a"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        health.set("a", False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="b"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        raw = channel.unary_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await raw(b"\xff\xff")
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await server.stop(1.0)


async def test_bytes_that_are_no_message_and_messages_that_make_no_sense_fail_that_call_only() -> None:
    async with picker("10.0.0.1:8000") as one, grpc.aio.insecure_channel(f"127.0.0.1:{one.port}") as channel:
        raw = channel.stream_stream("/envoy.service.ext_proc.v3.ExternalProcessor/Process")
        body = ProcessingRequest(request_body=HttpBody(body=b"x")).SerializeToString()
        for message, text in ((b"\xff\xff", "no ProcessingRequest"), (body, "request_header_mode: SEND")):
            error = await failure(raw(), message)
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert text in (error.details() or "")
        await decided(one, channel)
        assert one.metric("kvatlas_extproc_ends_total", how="protocol_error") == 2


async def decided(one: Picker, channel: grpc.aio.Channel) -> None:
    call = ExternalProcessorStub(channel).Process()
    first = ProcessingRequest()
    first.request_headers.end_of_stream = True
    await call.write(first)
    answer = await call.read()
    assert isinstance(answer, ProcessingResponse)
    assert answer.HasField("request_headers")
    await call.done_writing()
    assert await call.read() == grpc.aio.EOF
    await one.outcomes.count(1)


async def test_tls_serves_who_trusts_the_certificate(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(subprocess.run, [*made, *named], check=True, capture_output=True)
    async with picker("10.0.0.1:8000", tls_cert_file=str(cert), tls_key_file=str(key)) as one:
        credentials = grpc.ssl_channel_credentials(await asyncio.to_thread(cert.read_bytes))
        async with grpc.aio.secure_channel(f"localhost:{one.port}", credentials) as channel:
            await decided(one, channel)


def test_ports_and_certificates_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"extProc\.port: cannot listen"):
        asyncio.run(started(port=taken.getsockname()[1]))
    with pytest.raises(ConfigError, match=r"extProc\.tlsKeyFile: is missing"):
        asyncio.run(started(tls_cert_file="cert.pem"))
    with pytest.raises(ConfigError, match="cannot be used"):
        asyncio.run(started(tls_cert_file=str(tmp_path / "none"), tls_key_file=str(tmp_path / "none")))


async def started(**settings: Any) -> None:
    async with picker("10.0.0.1:8000", **settings):
        pass


async def iter_of(messages: list[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message


def test_the_settings_have_the_ports_that_gateways_expect() -> None:
    settings = ExtProcSettings()
    assert (settings.port, settings.health_port) == (9002, 9003)
    assert ssl.HAS_ALPN
