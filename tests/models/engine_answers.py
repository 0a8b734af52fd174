"""The test engine's answers: bodies as vLLM 0.32 writes them, whole or as server-sent events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec

DONE = b"data: [DONE]\n\n"

_json = msgspec.json.encode


class Answer:
    """What is answered to one request of ``path``."""

    def __init__(self, path: str, number: int, model: str, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        self.output_tokens = output_tokens
        self._path = path
        self._head: dict[str, Any] = {"id": f"{number}", "created": int(time.time()), "model": model}
        self._counts = prompt_tokens, cached_tokens, output_tokens

    def usage(self) -> dict[str, Any]:
        prompt, cached, output = self._counts
        if self._path == "/v1/responses":
            names = ("input_tokens", "input_tokens_details", "output_tokens")
        else:
            names = ("prompt_tokens", "prompt_tokens_details", "completion_tokens")
        values = (prompt, {"cached_tokens": cached}, output)
        return {**dict(zip(names, values, strict=True)), "total_tokens": prompt + output}

    def whole(self) -> bytes:
        """Return the body of an answer that is no stream."""
        text = "".join(word(i) for i in range(self.output_tokens))
        if self._path == "/v1/chat/completions":
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
            return _json({"object": "chat.completion", **self._head, "choices": [choice], "usage": self.usage()})
        if self._path == "/v1/responses":
            return _json(self._response(text))
        if self._path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, -0.5]}]
            return _json({"object": "list", **self._head, "data": data, "usage": self.usage()})
        choice = {"index": 0, "text": text, "finish_reason": "length"}
        return _json({"object": "text_completion", **self._head, "choices": [choice], "usage": self.usage()})

    def events(self, *, usage: bool) -> Iterator[bytes]:
        """Yield a stream's events, one a token; then what ends it."""
        if self._path == "/v1/responses":
            for i in range(self.output_tokens):
                yield _named("response.output_text.delta", {"delta": word(i)})
            yield _named("response.completed", {"response": self._response("".join(map(word, range(self.output_tokens))))})
            return
        for i in range(self.output_tokens):
            yield b"data: " + _json(self._chunk(i)) + b"\n\n"
        if usage:
            yield b"data: " + _json({"object": self._kind(), **self._head, "choices": [], "usage": self.usage()}) + b"\n\n"
        yield DONE

    def _chunk(self, i: int) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if i + 1 == self.output_tokens else None}
        if self._path == "/v1/chat/completions":
            choice["delta"] = {"content": word(i)} if i else {"role": "assistant", "content": word(i)}
        else:
            choice["text"] = word(i)
        return {"object": self._kind(), **self._head, "choices": [choice]}

    def _kind(self) -> str:
        return "chat.completion.chunk" if self._path == "/v1/chat/completions" else "text_completion"

    def _response(self, text: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        output = [{"type": "message", "role": "assistant", "status": "completed", "content": content}]
        return {"object": "response", **self._head, "status": "completed", "output": output, "usage": self.usage()}


def word(i: int) -> str:
    """Return the text of the i-th token of every answer."""
    return f" w{i}"


def error(status: int, message: str) -> bytes:
    return _json({"error": {"message": message, "type": "EngineError", "param": None, "code": status}})


def _named(event: str, data: dict[str, Any]) -> bytes:
    return f"event: {event}\n".encode() + b"data: " + _json({"type": event, **data}) + b"\n\n"
