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

TAIL_BYTES_MAX = 16 << 10
"""Of an answer only its end is kept, this much or up to twice that: usage stands there."""

USAGE_BYTES_MAX = 4 << 10

_JSON = json.JSONDecoder()
_USAGE = re.compile(rb'"usage"\s*:\s*\{')


class Usage(msgspec.Struct, frozen=True):
    """What the engine counted. None: it did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None


class AnswerReader:
    """Takes an answer's body piece by piece, however it is cut."""

    __slots__ = ("_stream", "_tail", "started")

    def __init__(self, *, stream: bool) -> None:
        """``stream``: whether the answer is one of server-sent events."""
        self._stream = stream
        self._tail = bytearray()
        self.started = False
        """Whether a token came: with the first event that carries data, or any byte of another answer."""

    def feed(self, piece: bytes) -> bool:
        """Take a piece; return whether the first token came with it."""
        self._tail += piece
        if len(self._tail) > 2 * TAIL_BYTES_MAX:
            del self._tail[:-TAIL_BYTES_MAX]
        if self.started or not piece or (self._stream and b"data:" not in self._tail):
            return False
        self.started = True
        return True

    @property
    def said_done(self) -> bool:
        """Whether a stream has told its end (``[DONE]``): clients may leave then, before the answer's last bytes."""
        return self._stream and said_done_in(self._tail)

    @property
    def kept_bytes(self) -> int:
        return len(self._tail)

    def usage(self) -> Usage:
        """Return what the end of the answer says."""
        return usage_in(self._tail)


def said_done_in(tail: bytes | bytearray) -> bool:
    """Whether the end of a stream tells that it is one."""
    return b"data: [DONE]" in tail[-TAIL_BYTES_MAX:]


def usage_in(tail: bytes | bytearray) -> Usage:
    """Return what the end of an answer says that the engine counted."""
    usage = _last_usage(tail)
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    return Usage(
        prompt_tokens=_count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        output_tokens=_count(usage.get("completion_tokens", usage.get("output_tokens"))),
    )


def _last_usage(tail: bytes | bytearray) -> dict[str, Any]:
    end = len(tail)
    while (start := tail.rfind(b'"usage"', 0, end)) >= 0:
        if found := _USAGE.match(tail, start):
            text = tail[found.end() - 1 : found.end() + USAGE_BYTES_MAX].decode(errors="replace")
            with contextlib.suppress(ValueError, RecursionError):
                usage: dict[str, Any] = _JSON.raw_decode(text)[0]
                return usage
        end = start
    return {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
