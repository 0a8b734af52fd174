"""RendererBackend against real HTTP servers that behave, and against ones that do not."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvatlas.config import RendererSettings
from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.prompts import ChatPrompt, TextPrompt, Truncation
from kvatlas.tokens.remote.render import RendererBackend
from kvatlas.tokens.results import TokenSource
from kvatlas.types import MultimodalItem

TEXT = TextPrompt(model="m", text="hello")
CHAT = ChatPrompt(model="m", messages=[{"role": "user", "content": "hi"}])
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
WORD = "of-the-test"
RENDER = "/v1/completions/render"
CHAT_RENDER = "/v1/chat/completions/render"
GOOD = {"request_id": "r", "token_ids": [1, 2, 3], "features": None, "cache_salt": None}
NO_ROUTE = (404, {"detail": "Not Found"})
# vLLM 0.32 without --enable-scale-out, as it says it.
SCALE_OUT_OFF = (
    403,
    {
        "error": {
            "message": "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.",
            "type": "PermissionDeniedError",
            "param": None,
            "code": 403,
        }
    },
)
NO_MODEL = (
    404,
    {"error": {"message": "The model `m` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}},
)

Reply = tuple[int, Any]


class Server:
    """A renderer of the test: answers by path, or does what a test wants with the connection."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply | Callable[[BaseHTTPRequestHandler], None]] = {
            RENDER: (200, [GOOD]),
            CHAT_RENDER: (200, GOOD),
            "/tokenize": (200, {"tokens": [7, 8], "count": 2, "max_model_len": 100}),
        }
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.connections: set[int] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, dict(self.headers), body))
                outer.connections.add(self.client_address[1])
                reply = outer.replies.get(self.path, NO_ROUTE)
                if callable(reply):
                    self.close_connection = True
                    reply(self)
                    return
                status, value = reply
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[Server]:
    made = Server()
    made.replies[RENDER] = (200, [{**GOOD, "token_ids": [9]}])
    yield made
    made.close()


@contextmanager
def backend(*urls: str, clock: Callable[[], float] = time.monotonic, **settings: Any) -> Iterator[RendererBackend]:
    made = RendererBackend(RendererSettings(endpoints=urls, **settings), clock)
    try:
        yield made
    finally:
        made.close()


def failure(asked: RendererBackend, prompt: TextPrompt | ChatPrompt = TEXT, timeout_s: float = 5) -> TokenizationError:
    with pytest.raises(TokenizationError) as caught:
        asked.tokenize(prompt, timeout_s)
    return caught.value


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# -- answers ------------------------------------------------------------------------------------------------------------


def test_texts_and_chats_become_tokens_over_one_connection(server: Server) -> None:
    with backend(server.url, token=WORD) as renderer:
        found = renderer.tokenize(TEXT, 5)
        assert (found.token_ids.tolist(), found.source, found.tokenizer) == ([1, 2, 3], TokenSource.RENDERER, server.url)
        assert found.complete
        assert renderer.tokenize(CHAT, 5).token_ids.tolist() == [1, 2, 3]
    assert server.paths == [RENDER, CHAT_RENDER]
    assert len(server.connections) == 1
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {f"Bearer {WORD}"}


def test_images_come_with_their_hashes_and_places(server: Server) -> None:
    chat = ChatPrompt(model="m", messages=[{"role": "user", "content": [IMAGE, {"type": "text", "text": "what?"}]}])
    features = {
        "mm_hashes": {"image": ["abc"]},
        "mm_placeholders": {"image": [{"offset": 1, "length": 2}]},
        "kwargs_data": None,
    }
    server.replies[CHAT_RENDER] = (200, {**GOOD, "features": features})
    with backend(server.url) as renderer:
        assert renderer.tokenize(chat, 5).multimodal == (MultimodalItem("abc", 1, 2),)
        assert server.asked[0][2]["messages"] == [*chat.messages], "the image goes as it came"
        server.replies[CHAT_RENDER] = (200, GOOD)
        error = failure(renderer, chat)
    assert (error.reason, error.field) == (TokenizationReason.UNSUPPORTED, "messages[0].content[0]")


def test_a_path_before_the_routes_is_kept_and_a_password_shows_nowhere(server: Server) -> None:
    server.replies["/inner" + RENDER] = (200, [GOOD])
    with backend(server.url.replace("//", "//user:password@") + "/inner/") as renderer:
        assert renderer.tokenize(TEXT, 5).tokenizer == server.url + "/inner"


# -- no render endpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [NO_ROUTE, SCALE_OUT_OFF, (405, {"detail": "Method Not Allowed"}), (404, b"")])
def test_tokenize_stands_in_where_render_is_not_there_and_that_is_remembered(server: Server, absent: Reply) -> None:
    server.replies[RENDER] = server.replies[CHAT_RENDER] = absent
    now_s = [0.0]
    with backend(server.url, clock=lambda: now_s[0]) as renderer:
        assert renderer.tokenize(TEXT, 5).token_ids.tolist() == [7, 8]
        assert renderer.tokenize(CHAT, 5).token_ids.tolist() == [7, 8]
        assert server.paths == [RENDER, "/tokenize", "/tokenize"]
        server.replies[RENDER] = (200, [GOOD])
        now_s[0] = 61.0
        assert renderer.tokenize(TEXT, 5).token_ids.tolist() == [1, 2, 3], "after a minute it is looked for again"


def test_what_tokenize_would_get_wrong_it_is_not_asked(server: Server, other: Server) -> None:
    server.replies[RENDER] = SCALE_OUT_OFF
    cut = TextPrompt(model="m", text="hello", truncation=Truncation(1, "left"))
    with backend(server.url) as renderer:
        error = failure(renderer, cut)
        assert (error.reason, error.field) == (TokenizationReason.UNSUPPORTED, "truncate_prompt_tokens")
        assert failure(renderer, cut).reason is TokenizationReason.UNSUPPORTED
        assert server.paths == [RENDER]
    with backend(server.url, other.url) as renderer:
        assert renderer.tokenize(cut, 5).token_ids.tolist() == [9], "the next one has render"


def test_an_address_with_neither_is_no_renderer(server: Server) -> None:
    server.replies.clear()
    with backend(server.url, failures_max=2) as renderer:
        assert failure(renderer).reason is TokenizationReason.UNAVAILABLE
        assert failure(renderer).reason is TokenizationReason.UNAVAILABLE
        assert failure(renderer).reason is TokenizationReason.CIRCUIT_OPEN


# -- refusals -----------------------------------------------------------------------------------------------------------


def refusal(message: str, param: str | None, status: int = 400) -> Reply:
    return status, {"error": {"message": message, "type": "BadRequestError", "param": param, "code": status}}


@pytest.mark.parametrize(
    ("reply", "reason", "field"),
    [
        (refusal("bad effort", "body.reasoning_effort"), TokenizationReason.REFUSED, "reasoning_effort"),
        (refusal("no template", None), TokenizationReason.REFUSED, "messages"),
        (refusal("at least 1025 input tokens", "input_tokens"), TokenizationReason.TOO_MANY_TOKENS, "messages"),
        (refusal("max_tokens must be at least 1, got 0", "max_tokens"), TokenizationReason.TOO_MANY_TOKENS, "messages"),
        ((422, b"<html>"), TokenizationReason.REFUSED, "messages"),
    ],
)
def test_a_refusal_names_its_field_ends_the_search_and_is_no_failure(
    server: Server, other: Server, reply: Reply, reason: TokenizationReason, field: str
) -> None:
    server.replies[CHAT_RENDER] = reply
    with backend(server.url, other.url, failures_max=1) as renderer:
        for _ in range(3):
            error = failure(renderer, CHAT)
            assert (error.reason, error.field) == (reason, field)
    assert (len(server.asked), len(other.asked)) == (3, 0)


def test_a_refusals_text_is_bounded_and_printable(server: Server) -> None:
    server.replies[RENDER] = refusal("line\n\x1b[31m" + "x" * 20_000, None)
    with backend(server.url) as renderer:
        text = str(failure(renderer))
    assert text.isprintable()
    assert len(text) < 1000


def test_a_model_that_one_renderer_lacks_is_looked_for_at_the_next(server: Server, other: Server) -> None:
    server.replies[RENDER] = NO_MODEL
    with backend(server.url, other.url, failures_max=1) as renderer:
        assert renderer.tokenize(TEXT, 5).token_ids.tolist() == [9]
        other.replies[RENDER] = NO_MODEL
        error = failure(renderer)
        assert (error.reason, error.field) == (TokenizationReason.UNKNOWN_MODEL, "model")
        other.replies[RENDER] = (500, b"")
        assert failure(renderer).reason is TokenizationReason.UNAVAILABLE, "the other may know it"
    assert "/tokenize" not in server.paths


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_token_is_told_and_is_not_the_prompts_fault(server: Server, status: int) -> None:
    server.replies[RENDER] = (status, {"error": "Unauthorized"})
    with backend(server.url) as renderer:
        error = failure(renderer)
    assert error.reason is TokenizationReason.UNAVAILABLE
    assert "tokens.renderer.token" in error.remedy


# -- servers that misbehave ---------------------------------------------------------------------------------------------


def hang(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(2)


def reset(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def end_early(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n[{")


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x00\x01\x02 hello\r\n\r\n")


def trickle(lines: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        try:
            for _ in range(200):
                handler.wfile.write(lines)
                handler.wfile.flush()
                time.sleep(0.02)
        except OSError:
            pass

    return reply


def endless(handler: BaseHTTPRequestHandler) -> None:
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(1000):
            handler.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
    except OSError:
        pass


def trickled_body(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    trickle(b"1\r\n \r\n")(handler)


def trickled_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    trickle(b"A: b\r\n")(handler)


def squeezed(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd")


MISBEHAVIOUR: list[Any] = [
    (reset, TokenizationReason.UNAVAILABLE),
    (end_early, TokenizationReason.UNAVAILABLE),
    (no_http, TokenizationReason.UNAVAILABLE),
    (endless, TokenizationReason.UNAVAILABLE),
    (squeezed, TokenizationReason.UNAVAILABLE),
    ((500, b"oops"), TokenizationReason.UNAVAILABLE),
    ((503, {"error": {"message": "no", "type": "x", "param": None, "code": 503}}), TokenizationReason.UNAVAILABLE),
    ((302, b""), TokenizationReason.UNAVAILABLE),
    ((204, b""), TokenizationReason.UNAVAILABLE),
    ((200, b"nonsense"), TokenizationReason.UNAVAILABLE),
    ((200, b"[" * 200_000), TokenizationReason.UNAVAILABLE),
    ((200, [{**GOOD, "token_ids": ["1"]}]), TokenizationReason.UNAVAILABLE),
    ((200, [{**GOOD, "token_ids": [2**32]}]), TokenizationReason.UNAVAILABLE),
    ((200, GOOD), TokenizationReason.UNAVAILABLE),
    (hang, TokenizationReason.TIMEOUT),
    (trickled_headers, TokenizationReason.TIMEOUT),
    (trickled_body, TokenizationReason.TIMEOUT),
]


@pytest.mark.parametrize(("reply", "reason"), MISBEHAVIOUR)
def test_a_failure_is_told_in_time_and_counts(server: Server, reply: Any, reason: TokenizationReason) -> None:
    server.replies[RENDER] = reply
    timeout_s = 0.3 if reason is TokenizationReason.TIMEOUT else 10  # a busy machine is no reason for one
    with backend(server.url, timeout=timeout_s, failures_max=2, answer_bytes_max=1 << 20) as renderer:
        for _ in range(2):
            assert failure(renderer, timeout_s=20).reason is reason  # a timeout, and not that the server gave up
        error = failure(renderer)
        assert error.reason is TokenizationReason.CIRCUIT_OPEN
        assert error.reason.transient
    assert len(server.asked) == 2


@pytest.mark.parametrize("reply", [case[0] for case in MISBEHAVIOUR])
def test_the_next_endpoint_is_asked_within_the_same_time(server: Server, other: Server, reply: Any) -> None:
    server.replies[RENDER] = reply
    with backend(server.url, other.url, timeout=3, answer_bytes_max=1 << 20) as renderer:
        assert renderer.tokenize(TEXT, 5).token_ids.tolist() == [9]  # without an answer in time it raises TIMEOUT


def test_an_endpoint_that_is_gone_is_skipped_and_tried_again_later(server: Server) -> None:
    gone = free_url()
    now_s = [0.0]
    with backend(gone, server.url, failures_max=2, retry_after=10, clock=lambda: now_s[0]) as renderer:
        for _ in range(4):
            assert renderer.tokenize(TEXT, 5).tokenizer == server.url
        assert [endpoint.breaker.state.value for endpoint in renderer._endpoints] == ["open", "closed"]
        now_s[0] = 10.0
        assert renderer.tokenize(TEXT, 5).tokenizer == server.url, "the trial fails, the caller does not notice"
        assert renderer._endpoints[0].breaker.retry_in_s == 10.0


def test_a_caller_in_a_hurry_does_not_open_the_circuit(server: Server) -> None:
    server.replies[RENDER] = lambda handler: time.sleep(0.2)
    with backend(server.url, failures_max=1, timeout=5) as renderer:
        for _ in range(3):
            assert failure(renderer, timeout_s=0.05).reason is TokenizationReason.TIMEOUT
        assert renderer._endpoints[0].breaker.state.value == "closed"


def test_calls_in_progress_are_bounded_and_a_place_is_given_back(server: Server) -> None:
    release = threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        release.wait(5)
        data = json.dumps([GOOD]).encode()
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    server.replies[RENDER] = slow
    with backend(server.url, calls_max=2, timeout=5) as renderer:
        found: list[int] = []
        threads = [threading.Thread(target=lambda: found.append(len(renderer.tokenize(TEXT, 5).token_ids))) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(server.asked) < 2:
            time.sleep(0.01)
        error = failure(renderer, timeout_s=0.05)
        assert error.reason is TokenizationReason.BUSY
        assert "tokens.renderer.callsMax" in error.problem
        release.set()
        for thread in threads:
            thread.join()
        assert found == [3, 3]
        assert renderer.tokenize(TEXT, 5).token_ids.tolist() == [1, 2, 3]


def test_a_kept_connection_that_the_server_closes_under_a_call_is_replaced(server: Server) -> None:
    def hang_up(_handler: BaseHTTPRequestHandler) -> None:
        server.replies[RENDER] = (200, [GOOD])

    with backend(server.url, failures_max=1) as renderer:
        assert renderer.tokenize(TEXT, 5).token_ids.tolist() == [1, 2, 3]
        server.replies[RENDER] = hang_up
        assert renderer.tokenize(TEXT, 5).token_ids.tolist() == [1, 2, 3]
    assert len(server.asked) == 3


def test_without_endpoints_there_is_no_backend() -> None:
    with backend() as renderer:
        assert failure(renderer).reason is TokenizationReason.NO_BACKEND
