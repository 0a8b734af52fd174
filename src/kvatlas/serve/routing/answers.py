"""What an engine's answer tells while it passes: when its first token comes, and what its usage says. Nothing is held back.

Source: OpenAI's API as vLLM 0.32 and SGLang answer it: one JSON object, or server-sent events whose last data before
``[DONE]`` may carry ``usage``.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import msgspec

TAIL_BYTES_MAX = 64 << 10
"""Of an answer only its end is kept: usage stands there."""

USAGE_BYTES_MAX = 4 << 10

_JSON = json.JSONDecoder()
_USAGE = re.compile(rb'"usage"\s*:\s*\{')


class Usage(msgspec.Struct, frozen=True):
    """What the engine counted. None: it did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


class AnswerReader:
    """Takes an answer's body piece by piece."""

    __slots__ = ("_stream", "_tail", "_usage_seen", "started")

    def __init__(self, *, stream: bool) -> None:
        """``stream``: whether the answer is one of server-sent events."""
        self._stream = stream
        self._tail = bytearray()
        self._usage_seen = False
        self.started = False
        """Whether a token came: with the first event that carries data, or any byte of another answer."""

    def feed(self, chunk: bytes) -> bool:
        """Take a piece; return whether the first token came with it."""
        first = not self.started and bool(chunk) and (not self._stream or b"data:" in chunk)
        if first:
            self.started = True
        if self._stream:
            # Each event is small; what matters is whether one of them carries usage.
            if self._usage_seen or b'"usage"' in chunk:
                self._usage_seen = True
                self._keep(chunk)
        else:
            self._keep(chunk)
        return first

    def usage(self) -> Usage:
        """Return what the end of the answer says."""
        usage = _last_usage(self._tail)
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        return Usage(
            prompt_tokens=_count(usage.get("prompt_tokens", usage.get("input_tokens"))),
            cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
            output_tokens=_count(usage.get("completion_tokens", usage.get("output_tokens"))),
        )

    def _keep(self, chunk: bytes) -> None:
        self._tail += chunk
        if len(self._tail) > TAIL_BYTES_MAX:
            del self._tail[: len(self._tail) - TAIL_BYTES_MAX]


def _last_usage(tail: bytearray) -> dict[str, Any]:
    usage: dict[str, Any] = {}
    for found in _USAGE.finditer(tail):
        text = tail[found.end() - 1 : found.end() + USAGE_BYTES_MAX].decode(errors="replace")
        with contextlib.suppress(ValueError, RecursionError):
            usage = _JSON.raw_decode(text)[0]
    return usage


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
