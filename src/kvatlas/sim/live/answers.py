"""An engine's answers: bodies as vLLM 0.32 writes them, whole or as server-sent events. No IO."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvatlas.sim.live.engine import Generation
from kvatlas.sim.live.requests import Asked
from kvatlas.sim.live.tokens import EngineTokens

DONE = b"data: [DONE]\n\n"
_json = msgspec.json.encode


class Answer:
    """How one generation is told. ``chat``: as a chat completion."""

    def __init__(self, asked: Asked, generation: Generation, tokens: EngineTokens, model: str, *, chat: bool) -> None:
        self._asked = asked
        self._generation = generation
        self._tokens = tokens
        self._chat = chat
        prefix = "chatcmpl" if chat else "cmpl"
        self._head = {"id": f"{prefix}-{generation.number:x}", "created": int(time.time()), "model": model}
        self._reason = "stop" if asked.output_tokens is None else "length"

    def whole(self) -> bytes:
        """Return the body of an answer that is no stream; only once it is finished."""
        ids = self._ids(0, self._generation.output_tokens)
        text = "".join(map(self._tokens.spelled, ids))
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._reason, "logprobs": None}
        body: dict[str, Any] = {"object": "chat.completion" if self._chat else "text_completion", **self._head}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if self._asked.return_token_ids:
            choice["token_ids"] = ids
            (body if self._chat else choice)["prompt_token_ids"] = self._prompt()
        return _json({**body, "choices": [choice], "usage": self._usage()})

    def begin(self) -> bytes:
        """Return what a stream begins with, as soon as there is a first token: a chat tells who speaks."""
        if not self._chat:
            return b""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        extra = {"prompt_token_ids": self._prompt()} if self._asked.return_token_ids else {}
        return self._event({**extra, "choices": [choice]})

    def piece(self, first: int, end: int) -> bytes:
        """Return the event of the answer's tokens ``first`` up to ``end``."""
        ids = self._ids(first, end)
        text = "".join(map(self._tokens.spelled, ids))
        reason = self._reason if end == self._generation.output_tokens else None
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if self._chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        if self._asked.return_token_ids:
            choice["token_ids"] = ids
            if first == 0 and not self._chat:
                choice["prompt_token_ids"] = self._prompt()
        return self._event({"choices": [choice]})

    def last(self) -> bytes:
        """Return what ends a stream: the usage where it is asked for, and the mark."""
        usage = self._event({"choices": [], "usage": self._usage()}) if self._asked.include_usage else b""
        return usage + DONE

    def _event(self, fields: Mapping[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return b"data: " + _json({"object": kind, **self._head, **fields}) + b"\n\n"

    def _usage(self) -> dict[str, Any]:
        generation = self._generation
        return {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.output_tokens,
            "total_tokens": len(generation.tokens),
            "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        }

    def _ids(self, first: int, end: int) -> Sequence[int]:
        prompt = self._generation.prompt_tokens
        return self._generation.tokens[prompt + first : prompt + end].tolist()

    def _prompt(self) -> Sequence[int]:
        return self._generation.tokens[: self._generation.prompt_tokens].tolist()


def failure(status: int, message: str, kind: str, param: str | None = None) -> bytes:
    """Return an error in OpenAI's form."""
    return _json({"error": {"message": message, "type": kind, "param": param, "code": status}})
