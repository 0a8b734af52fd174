"""No engine: a server that costs next to nothing and answers every request with the same bytes, so that a router is measured.

For a router's throughput alone: an embedded engine tokenizes each prompt, and answers a few hundred requests a second
where this one answers over 9,000.

python -m benchmarks.sides.canned_engine PORT [EVENTS]    EVENTS: server-sent events where a request asks for a stream

Completions only. /tokenize answers with as many tokens as a 6.9 KB prompt has.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys

USAGE = {"prompt_tokens": 1700, "completion_tokens": 8, "total_tokens": 1708, "prompt_tokens_details": {"cached_tokens": 0}}
WHOLE = json.dumps(
    {"id": "c", "object": "text_completion", "choices": [{"index": 0, "text": "x" * 64}], "usage": USAGE}
).encode()
EVENT = b'data: {"id":"c","object":"text_completion","choices":[{"index":0,"text":"word "}]}\n\n'
MODELS = json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}).encode()
TOKENS = json.dumps({"count": 1700, "max_model_len": 4096, "tokens": list(range(1700))}).encode()
STREAMS = re.compile(rb'"stream": ?true')
"""Routers write a request's JSON anew, each in its own way."""
METRICS = (
    b'vllm:num_requests_running{engine="0",model_name="tiny"} 1.0\n'
    b'vllm:num_requests_waiting{engine="0",model_name="tiny"} 0.0\n'
    b'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.1\n'
)


def plain(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


class Engine(asyncio.Protocol):
    """One connection. Requests on it are answered one after the other."""

    def __init__(self, events: int) -> None:
        self.events = events
        self.buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.buffer.startswith(b"PRI "):  # HTTP/2, to ask whether it speaks gRPC
            self.transport.close()
            return
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            length = self.length(head, end + 4)
            if length is None or len(self.buffer) < end + 4 + length:
                return
            body = bytes(self.buffer[end + 4 : end + 4 + length])
            del self.buffer[: end + 4 + length]
            self.answer(head.split(b" ", 2)[1], body)

    def length(self, head: bytes, start: int) -> int | None:
        """Return the body's length; None where its end has not come."""
        if b"transfer-encoding: chunked" in head:
            end = self.buffer.find(b"0\r\n\r\n", start)
            return None if end < 0 else end + 5 - start
        found = re.search(rb"content-length: *(\d+)", head)
        return int(found[1]) if found else 0

    def answer(self, path: bytes, body: bytes) -> None:
        write = self.transport.write  # type: ignore[attr-defined]
        if path == b"/metrics":
            write(plain(METRICS, b"text/plain"))
        elif path == b"/v1/models":
            write(plain(MODELS))
        elif path == b"/tokenize":
            write(plain(TOKENS))
        elif STREAMS.search(body):
            write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(self.events):
                write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
            write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        else:
            write(plain(WHOLE))


async def serve(port: int, events: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Engine(events), "127.0.0.1", port)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the benchmark ends
    server.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8))
