"""What the proxy refuses, in which words, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import subprocess
from pathlib import Path

import aiohttp
import pytest

from kvatlas.config import Seconds
from kvatlas.config.proxy import ProxySettings
from kvatlas.errors import ConfigError, SaturatedError
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.outcome import End
from kvatlas.route.request import RouteRequest
from kvatlas.types import PodId
from tests.integration.proxying import CHAT, COMPLETION, Proxy, proxy
from tests.models.embedded import engine

pytestmark = pytest.mark.usefixtures("each_stack")

BODY = json.dumps(COMPLETION).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def request(*lines: bytes, body: bytes = BODY) -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


async def refused(px: Proxy, sent: bytes) -> tuple[int, dict[str, object]]:
    """Send bytes; return the status and the error that they are answered with, before the connection is closed."""
    head, _, body = (await px.raw(sent)).partition(b"\r\n\r\n")
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    status = int(head.split()[1])
    assert error["code"] == status
    return status, error


# -- bodies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [(b"", "body"), (b"{", "body"), (b"[]", "body"), (b"\xff{}", "body"), (b"{}", "body"), (b'{"model": ""}', "model")],
)
async def test_a_body_that_cannot_be_routed_is_refused(body: bytes, param: str) -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.post("/v1/completions", data=body, headers={"content-type": "application/json"}) as answer:
            assert answer.status == 400
            error = (await answer.json())["error"]
        assert error["type"] == "invalid_request_error"
        assert not one.requests
        assert param in error["param"] or param == "body"


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_body_that_is_too_large_is_refused(framing: str) -> None:
    async def pieces() -> object:
        for _ in range(64):
            yield b"x" * 1024

    async with engine() as one, proxy(one, settings={"body_bytes_max": 4096}) as px:
        data = b"x" * 65_536 if framing == "length" else pieces()
        async with px.client.post("/v1/completions", data=data, headers={"content-type": "application/json"}) as answer:
            assert answer.status == 413
            assert "proxy.bodyBytesMax" in (await answer.json())["error"]["message"]
        assert not one.requests


async def test_a_client_that_asks_first_is_told_to_go_on_or_not_to() -> None:
    async with engine() as one, proxy(one, settings={"body_bytes_max": 4096}) as px:
        reader, writer = await asyncio.open_connection(*px.address)
        writer.write(request(b"Expect: 100-continue", b"Content-Length: %d" % len(BODY), body=b""))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        assert (await refused(px, request(b"Expect: 100-continue", b"Content-Length: 5000", body=b"")))[0] == 413


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async with engine() as one, proxy(one, settings={"client_timeout": Seconds(0.1)}) as px:
        status, error = await refused(px, request(b"Content-Length: 100", body=b'{"model":'))
        assert status == 408
        assert "proxy.clientTimeout" in str(error["message"])


async def test_headers_that_do_not_end_are_given_up() -> None:
    async with engine() as one, proxy(one, settings={"keep_alive": Seconds(0.1)}) as px:
        assert await px.raw(HEAD) == b""


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=x"}, {"content-encoding": "gzip"}],
)
async def test_a_body_of_another_kind_is_refused(headers: dict[str, str]) -> None:
    async with engine() as one, proxy(one) as px:
        async with px.client.post(
            "/v1/completions", data=BODY, headers={"content-type": "application/json", **headers}
        ) as answer:
            assert answer.status == 415
        assert not one.requests


# -- framing ------------------------------------------------------------------------------------------------------------

LENGTH = b"Content-Length: %d" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    "lines",
    [
        (LENGTH, CHUNKED),
        (CHUNKED, LENGTH),
        (LENGTH, b"Content-Length: 3"),
        (b"Content-Length: -1",),
        (b"Content-Length: 0x10",),
        (b"Content-Length: 1_0",),
        (b"Content-Length: +8",),
        (b"Transfer-Encoding: xchunked",),
        (b"Transfer-Encoding: gzip, chunked",),
        (b"Transfer-Encoding: chunked, identity",),
        (b"Transfer-Encoding : chunked",),
        (b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
        (LENGTH, b"X-A\x00: 1"),
        (LENGTH, b" folded: 1"),
    ],
)
async def test_a_request_that_two_servers_could_read_differently_is_refused(lines: tuple[bytes, ...]) -> None:
    smuggled = BODY + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    async with engine() as one, proxy(one) as px:
        answers = await px.raw(request(*lines, body=smuggled))
        assert answers[:4] + answers[8:12] == b"HTTP 400"
        assert answers.count(b"\r\n\r\n") == 1
        assert not one.requests


@pytest.mark.parametrize("lines", [(LENGTH, LENGTH), (LENGTH, b"X-A: 1\nX-B: 2")])
async def test_what_servers_may_take_or_refuse_is_refused_or_framed_anew(lines: tuple[bytes, ...]) -> None:
    """Equal lengths, and a line that ends with LF alone: RFC 9110 section 8.6, RFC 9112 section 2.2."""
    async with engine() as one, proxy(one) as px:
        answer = await px.raw(request(*lines, b"Connection: close"))
        assert answer[9:12] in (b"200", b"400")
        for seen in one.requests:
            assert seen.body == BODY
            assert [name.lower() for name, _ in seen.raw_headers].count(b"content-length") == 1


async def test_what_is_no_http_is_refused() -> None:
    async with engine() as one, proxy(one) as px:
        for sent in (
            b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
            b"POST /v1/completions HTTP/9.9\r\n\r\n",
            HEAD + b"X-Long: " + b"a" * 100_000 + b"\r\nConnection: close\r\n\r\n",
        ):
            assert (await px.raw(sent)).split()[1] in (b"400", b"431")
        assert not one.requests


async def test_chunked_bodies_are_framed_anew() -> None:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(BODY[i : i + 7]), BODY[i : i + 7]) for i in range(0, len(BODY), 7))
    async with engine() as one, proxy(one) as px:
        answer = await px.raw(request(CHUNKED, b"Connection: close", body=chunks + b"0\r\nX-Trailer: 1\r\n\r\n"))
        assert answer.startswith(b"HTTP/1.1 200")
        seen = one.requests[-1]
        assert seen.body == BODY
        assert seen.headers["content-length"] == str(len(BODY))
        assert not seen.headers.keys() & {"transfer-encoding", "x-trailer"}


async def test_requests_in_a_row_are_answered_in_a_row() -> None:
    last = request(LENGTH, b"Connection: close")
    async with engine() as one, proxy(one) as px:
        answers = await px.raw(request(LENGTH) * 3 + last)
        assert answers.count(b"HTTP/1.1 200 OK") == 4
        assert len(one.requests) == 4


# -- who may, and how many ----------------------------------------------------------------------------------------------


async def test_a_token_is_needed_where_one_is_set() -> None:
    async with engine() as one, proxy(one, settings={"token": "right"}) as px:
        for token, status in (("wrong", 401), ("right", 200)):
            headers = {"authorization": f"Bearer {token}"}
            async with px.client.post("/v1/completions", json=COMPLETION, headers=headers) as answer:
                assert answer.status == status
        async with px.client.get("/v1/models") as answer:
            assert answer.status == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
        async with px.client.get("/healthz") as answer:
            assert answer.status == 200


async def test_requests_beyond_the_bound_are_refused_at_once() -> None:
    async with engine() as one, proxy(one, settings={"concurrency_max": 2}) as px:
        one.stall(after=0)
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(_status(px)) for _ in range(2)]
            await one.until(lambda e: len(e.requests) == 2)
            async with px.client.post("/v1/completions", json=COMPLETION) as answer:
                assert answer.status == 503
                assert answer.headers["retry-after"] == "1"
                assert "proxy.concurrencyMax" in (await answer.json())["error"]["message"]
            one.fail()
        assert [task.result() for task in waiting] == [200, 200]


async def test_connections_beyond_the_bound_are_closed() -> None:
    async with engine() as one, proxy(one, settings={"connections_max": 3}) as px:
        kept = [await asyncio.open_connection(*px.address) for _ in range(3)]
        for reader, writer in kept:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(ConnectionError):
            assert await px.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        for _, writer in kept:
            writer.close()


async def test_a_request_that_is_not_admitted_says_why() -> None:
    class Busy:
        async def admit(self, request: RouteRequest, body_bytes: int) -> None:
            raise SaturatedError("everybody is busy")

        def changed(self) -> None: ...

    async with (
        engine() as one,
        proxy(one, admission=Busy()) as px,
        px.client.post("/v1/chat/completions", json=CHAT) as answer,
    ):
        assert answer.status == 429
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        assert (await answer.json())["error"]["type"] == "rate_limit_error"


# -- stopping -----------------------------------------------------------------------------------------------------------


async def _status(px: Proxy) -> int:
    async with px.client.post("/v1/completions", json={**COMPLETION, "stream": True, "max_tokens": 3}) as answer:
        await answer.read()
        return answer.status


async def test_a_stop_lets_answers_end_and_takes_nothing_new() -> None:
    async with engine() as one, proxy(one) as px:
        one.stall(after=1)
        idle_reader, idle_writer = await asyncio.open_connection(*px.address)
        async with px.client.post("/v1/completions", json={**COMPLETION, "stream": True}) as answer:
            await answer.content.readuntil(b"\n\n")
            stopping = asyncio.create_task(px.server.stop(20))
            assert await asyncio.wait_for(idle_reader.read(), 20) == b""
            idle_writer.close()
            with pytest.raises(aiohttp.ClientConnectorError):
                async with px.client.get("/readyz"):
                    pass
            one.fail()
            assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")
        await asyncio.wait_for(stopping, 20)


async def test_readiness_says_that_it_drains() -> None:
    async with engine() as one, proxy(one) as px:
        px.server.drain()
        async with px.client.get("/readyz") as answer:
            assert answer.status == 503
            assert answer.headers["connection"] == "close"
        async with px.client.post("/v1/completions", json=COMPLETION) as answer:
            assert answer.status == 503
            assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-shutting-down"


async def test_answers_that_do_not_end_within_the_grace_are_cut() -> None:
    async with engine() as one, proxy(one) as px:
        one.stall(after=1)
        async with px.client.post("/v1/completions", json={**COMPLETION, "stream": True}) as answer:
            await answer.content.readuntil(b"\n\n")
            await asyncio.wait_for(px.server.stop(0.05), 20)
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()
        await one.until(lambda e: e.cancelled == 1)
        assert [outcome.end for _, outcome in px.outcomes] == [End.CLIENT_GONE]
        assert px.server.in_progress == 0


async def test_two_proxies_share_a_port_where_that_is_asked_for() -> None:
    async with engine() as one, proxy(one, settings={"reuse_port": True}) as px:
        port = px.address[1]
        async with proxy(one, settings={"reuse_port": True, "port": port}) as other:
            assert other.address == px.address
        with pytest.raises(ConfigError, match=r"proxy\.port"):
            async with proxy(one, settings={"port": port}):
                pass


async def test_both_sides_speak_tls_where_that_is_asked_for(tmp_path: Path) -> None:
    made, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(made)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    tls = {"stack": "python", "tls_cert_file": str(made), "tls_key_file": str(key), "engine_ca_file": str(made)}
    async with engine() as one, proxy(one, settings=tls) as inner, proxy(settings=tls) as outer:
        host, port = inner.address
        outer.route_to(Endpoint(name=EndpointName("inner"), address=host, port=port, pod=PodId("p"), tls=True))
        trusted = ssl.create_default_context(cafile=str(made))
        async with outer.client.post("/v1/completions", json=COMPLETION, ssl=trusted) as answer:
            assert answer.status == 200
        assert one.requests[-1].headers["x-forwarded-proto"] == "https"


async def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    for settings in ({"tls_cert_file": missing, "tls_key_file": missing}, {"engine_ca_file": missing}):
        with pytest.raises(ConfigError, match=r"proxy\."):
            async with proxy(settings={"stack": "python", **settings}):
                pass
    assert ProxySettings().host == "127.0.0.1"
