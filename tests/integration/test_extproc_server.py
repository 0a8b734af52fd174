"""The endpoint picker's own ports against grpc's client: bad messages, TLS, addresses that cannot be had."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvatlas.config.extproc import ExtProcSettings
from kvatlas.errors import ConfigError
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2 import HttpBody, ProcessingRequest, ProcessingResponse
from kvatlas.proto.envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from kvatlas.route.outcome import End
from tests.models.picker import Picker, picker

pytestmark = pytest.mark.usefixtures("each_stack")


async def failure(call: Any, message: bytes) -> grpc.aio.AioRpcError:
    await call.write(message)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call.read()
    return failed.value


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
    async with picker("10.0.0.1:8000", stack="auto", tls_cert_file=str(cert), tls_key_file=str(key)) as one:
        credentials = grpc.ssl_channel_credentials(await asyncio.to_thread(cert.read_bytes))
        async with grpc.aio.secure_channel(f"localhost:{one.port}", credentials) as channel:
            await decided(one, channel)


async def test_the_native_stack_is_not_asked_for_tls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"extProc\.stack: the native"):
        await started(stack="native", tls_cert_file=str(tmp_path / "cert.pem"), tls_key_file=str(tmp_path / "key.pem"))


async def test_who_watches_health_is_told_when_it_changes() -> None:
    async with picker("10.0.0.1:8000") as one, grpc.aio.insecure_channel(f"127.0.0.1:{one.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.create_task(one.stop())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        await asyncio.wait_for(stopping, 20)


async def test_a_stream_that_outlives_the_grace_is_cut_off_and_its_request_ends() -> None:
    async with picker("10.0.0.1:8000", shutdown_grace=0.1) as one:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{one.port}") as channel:
            call = ExternalProcessorStub(channel).Process()
            first = ProcessingRequest()
            first.request_headers.end_of_stream = True
            await call.write(first)
            assert isinstance(await call.read(), ProcessingResponse)
            await one.stop()
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await call.read()
        assert [outcome.end for _, outcome in one.outcomes.seen] == [End.CLIENT_GONE]
        assert one.in_flight == 0


def test_ports_and_certificates_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"extProc\.port: cannot listen"):
        asyncio.run(started(port=taken.getsockname()[1]))
    empty = tmp_path / "empty.pem"
    empty.touch()
    for file in (empty, tmp_path / "none"):
        with pytest.raises(ConfigError, match=r"extProc\.tlsCertFile: no use with extProc\.tlsKeyFile"):
            asyncio.run(started(stack="auto", tls_cert_file=str(file), tls_key_file=str(file)))


async def started(**settings: Any) -> None:
    async with picker("10.0.0.1:8000", **settings):
        pass


def test_the_settings_have_the_ports_that_gateways_expect() -> None:
    settings = ExtProcSettings()
    assert (settings.port, settings.health_port) == (9002, 9003)
