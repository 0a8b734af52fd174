"""The service as a process: it starts or says why not, and it stops without losing what is in progress."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from kvatlas.config import load_config
from kvatlas.errors import ConfigError
from kvatlas.proto.kvatlas.v1 import kvatlas_pb2, kvatlas_pb2_grpc
from kvatlas.serve.service import serve
from tests.integration.running import FREE, MODEL, PROMPT, filled, running, stored

PROGRAM = """
import sys
from kvatlas.config import load_config
from kvatlas.serve.service import run
run(load_config(environ={}, overrides=sys.argv[1:]))
"""


class Process:
    """A service in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    async def line(self, event: str) -> dict[str, Any]:
        """Return the next log line of this event."""
        assert self.process.stderr is not None
        while text := await asyncio.wait_for(self.process.stderr.readline(), 20):
            self.lines.append(json.loads(text))
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"{event!r} was not logged: {self.lines}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        assert self.process.stderr is not None
        rest = await self.process.stderr.read()
        self.lines += [json.loads(line) for line in rest.splitlines()]
        return await asyncio.wait_for(self.process.wait(), 20)


@asynccontextmanager
async def process(*overrides: str) -> AsyncIterator[Process]:
    started = Process(
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, *FREE, *overrides, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
    )
    try:
        yield started
    finally:
        if started.process.returncode is None:
            started.process.kill()
            await started.process.wait()


class SlowPost:
    """A POST whose body is held back until it is wanted."""

    def __init__(self, url: str) -> None:
        self._release = asyncio.Event()
        self._url = url

    async def _body(self) -> AsyncIterator[bytes]:
        body = json.dumps({"model": MODEL, "token_ids": PROMPT}).encode()
        yield body[:10]
        await self._release.wait()
        yield body[10:]

    async def post(self) -> httpx.Response:
        async with httpx.AsyncClient(timeout=20) as http:
            return await http.post(f"{self._url}/v1/score", content=self._body())

    def finish(self) -> None:
        self._release.set()


async def in_progress(url: str, count: int) -> None:
    async with httpx.AsyncClient() as http:
        for _ in range(500):
            if f"\nkv_cache_queries_in_progress {count:.1f}\n" in (await http.get(f"{url}/metrics")).text:
                return
            await asyncio.sleep(0.01)
    raise AssertionError("the request did not reach the service")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_on_a_signal_requests_in_progress_finish_and_new_ones_are_refused(number: int) -> None:
    async with process() as service:
        addresses = await service.line("serving")
        slow = SlowPost(addresses["http"])
        answer = asyncio.create_task(slow.post())
        await in_progress(addresses["http"], 1)
        service.signal(number)
        stopping = await service.line("stopping")
        assert stopping["in_progress"] == 1
        await asyncio.sleep(0.5)
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(f"{addresses['http']}/healthz")
        slow.finish()
        assert (await answer).status_code == 200
        assert await service.ended() == 0
        assert service.lines[-1]["event"] == "stopped"
        assert not [line for line in service.lines if line["level"] == "error"]


async def test_a_request_that_does_not_end_is_cut_when_the_grace_is_over() -> None:
    async with process("api.shutdownGrace=1s") as service:
        addresses = await service.line("serving")
        slow = SlowPost(addresses["http"])
        answer = asyncio.create_task(slow.post())
        await in_progress(addresses["http"], 1)
        async with grpc.aio.insecure_channel(addresses["grpc"]) as channel:
            requests = asyncio.Event()

            async def endless() -> AsyncIterator[kvatlas_pb2.PublishEventsRequest]:
                yield stored("pod-a", 0)
                await requests.wait()

            publishing = kvatlas_pb2_grpc.KvAtlasStub(channel).PublishEvents(endless())
            await asyncio.sleep(0.2)
            began = time.monotonic()
            service.signal(signal.SIGTERM)
            assert await service.ended() == 0
            assert 0.8 < time.monotonic() - began < 5
            with pytest.raises(grpc.aio.AioRpcError):
                await publishing
        slow.finish()
        with pytest.raises(httpx.HTTPError):
            (await answer).raise_for_status()
        assert not [line for line in service.lines if "exception" in line]
        assert "request cut off: the service stops" in [line["event"] for line in service.lines]


async def test_a_second_signal_stops_at_once() -> None:
    async with process("api.shutdownGrace=60s") as service:
        addresses = await service.line("serving")
        slow = SlowPost(addresses["http"])
        answer = asyncio.create_task(slow.post())
        await in_progress(addresses["http"], 1)
        began = time.monotonic()
        service.signal(signal.SIGTERM)
        await service.line("stopping")
        service.signal(signal.SIGTERM)
        await service.ended()
        assert time.monotonic() - began < 10
        slow.finish()
        with pytest.raises(httpx.HTTPError):
            (await answer).raise_for_status()


async def test_logs_are_json_lines_without_prompts() -> None:
    async with process("log.level=debug") as service:
        addresses = await service.line("serving")
        async with httpx.AsyncClient() as http:
            url = f"{addresses['http']}/v1/locality"
            await http.get(url, params={"token_ids": "424242", "model": "m", "cache_salt": "hidden"})
            await http.post(url, json={"token_ids": [424242, -1], "model": "m", "text": "hidden"})
        service.signal(signal.SIGTERM)
        await service.ended()
        assert [line["route"] for line in service.lines if line["event"] == "request"] == ["/v1/locality"] * 2
        logged = json.dumps(service.lines)
        assert "424242" not in logged
        assert "hidden" not in logged
        assert service.process.stdout is not None
        assert await service.process.stdout.read() == b""


async def test_a_port_in_use_is_refused_by_name_and_leaves_nothing_running() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name in ("api.port", "api.grpcPort"):
            with pytest.raises(ConfigError) as caught:
                await serve(load_config(environ={}, overrides=(*FREE, f"{name}={port}")))
            assert caught.value.path == name
            assert str(port) in caught.value.problem
    async with running(f"api.port={port}"):
        pass


async def test_an_address_of_another_machine_is_refused() -> None:
    for name in ("api.host", "api.grpcHost"):
        with pytest.raises(ConfigError) as caught:
            await serve(load_config(environ={}, overrides=(*FREE, f"{name}=203.0.113.1")))
        assert caught.value.path.startswith("api.")


async def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("not a certificate")
    files = (f"api.tlsCertFile={tmp_path}/cert.pem", f"api.tlsKeyFile={tmp_path}/key.pem")
    with pytest.raises(ConfigError) as caught:
        await serve(load_config(environ={}, overrides=(*FREE, *files)))
    assert caught.value.path == "api.tlsCertFile"


async def test_http_and_grpc_speak_tls_where_a_certificate_is_given(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject)
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)  # noqa: ASYNC221
    async with running(f"api.tlsCertFile={cert}", f"api.tlsKeyFile={key}") as addresses:
        assert addresses.http.startswith("https://")
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(cert))) as http:
            assert (await http.get(f"{addresses.http}/healthz")).status_code == 200
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        async with grpc.aio.secure_channel(addresses.grpc, credentials) as channel:
            await kvatlas_pb2_grpc.KvAtlasStub(channel).Pods(kvatlas_pb2.PodsRequest())


async def test_two_services_run_beside_each_other() -> None:
    async with running() as one, running() as other:
        await filled(one)
        await filled(other)
        assert one.http != other.http


async def test_stopping_leaves_no_open_files_and_no_tasks() -> None:
    async with running():
        pass
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        async with running() as addresses:
            await filled(addresses)
    await asyncio.sleep(0.2)
    assert len(os.listdir("/proc/self/fd")) <= files + 3
    assert asyncio.all_tasks() == {asyncio.current_task()}
