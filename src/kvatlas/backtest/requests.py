"""Recorded requests: one JSON object a line, as the captures' ``*.requests.jsonl`` have them."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import msgspec

from kvatlas.errors import RequestError, TokensError
from kvatlas.keys import as_token_array
from kvatlas.types import DpRank, PodId


class RecordedRequest(msgspec.Struct, frozen=True):
    """One prompt that was sent to an engine while its events were recorded."""

    sent_s: float
    """Unix time."""
    tag: str
    token_ids: array[int]
    where: str
    """File and line, for messages."""
    model: str | None = None
    """The base model or a LoRA adapter, as it was asked for; None where the record does not say."""
    cache_salt: str | None = None
    cached_tokens: int | None = None
    """What the engine said that it had; None where it was not asked to tell."""
    pod: PodId | None = None
    """Which pod served it, where the record says so."""
    dp_rank: DpRank | None = None
    after_reset: bool = False
    """The first one after a reset: the engine publishes its clear one step late, so the prediction may be too high."""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _PromptDetails | None = None


class _Arguments(msgspec.Struct):
    cache_salt: str | None = None


class _Record(msgspec.Struct):
    """The fields that matter here; records have more."""

    t: float
    tag: str = ""
    prompt_token_ids: list[int] | None = None
    model: str | None = None
    kw: _Arguments | None = None
    usage: _Usage | None = None
    pod: str | None = None
    dp_rank: int | None = None

    @property
    def is_reset(self) -> bool:
        return self.prompt_token_ids is None and self.tag.lower().startswith("reset")


_RECORD = msgspec.json.Decoder(_Record)


def read_requests(path: str | os.PathLike[str]) -> list[RecordedRequest]:
    """Return the requests of a file in order of time.

    Records without ``prompt_token_ids`` are notes; one whose tag begins with "reset" marks the next request as the first
    after it. Raises RequestError that names the line for what is no such record.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RequestError(
            str(path), f"cannot be read: {error.strerror}", "name a file of requests, one JSON object a line"
        ) from None
    lines = [(f"{path} line {number}", line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    records = [(_parse(line, where), where) for where, line in lines]
    records.sort(key=lambda entry: entry[0].t)
    requests = []
    after_reset = False
    for record, where in records:
        if record.prompt_token_ids is not None:
            requests.append(_request(record, where, after_reset=after_reset))
            after_reset = False
        else:
            after_reset |= record.is_reset
    return requests


def read_request(text: bytes, where: str) -> RecordedRequest:
    """Return one record. RequestError for what is none, or has no tokens."""
    record = _parse(text, where)
    if record.prompt_token_ids is None:
        raise RequestError(where, "has no prompt_token_ids", "name a record of a request, not of a reset")
    return _request(record, where, after_reset=False)


def _parse(text: bytes, where: str) -> _Record:
    try:
        return _RECORD.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        remedy = 'one object such as {"t": 1795332353.2, "tag": "r0", "prompt_token_ids": [1, 2]}'
        raise RequestError(where, f"is no recorded request: {error}", remedy) from None


def _request(record: _Record, where: str, *, after_reset: bool) -> RecordedRequest:
    assert record.prompt_token_ids is not None
    details = record.usage.prompt_tokens_details if record.usage else None
    try:
        token_ids = as_token_array(record.prompt_token_ids)
    except TokensError as error:
        raise RequestError(where, f"prompt_token_ids: {error.problem}", "token ids are integers 0 to 4294967295") from None
    return RecordedRequest(
        sent_s=record.t,
        tag=record.tag,
        token_ids=token_ids,
        model=record.model,
        cache_salt=record.kw.cache_salt if record.kw else None,
        cached_tokens=details.cached_tokens if details else None,
        pod=None if record.pod is None else PodId(record.pod),
        dp_rank=None if record.dp_rank is None else DpRank(record.dp_rank),
        after_reset=after_reset,
        where=where,
    )
