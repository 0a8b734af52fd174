"""The packaged recordings of two vLLM 0.32 engines: event frames with their times, and the requests that caused them.

``python -m kvatlas.demo.captures tests/data/vllm-0.32`` makes the packaged files from the recordings that the tests use: the
frames as they are, of the requests only what the demo asks for and compares.
"""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import msgspec

FOLDER = "captures"
_RECORD_HEAD = struct.Struct(">QI")
_LENGTH = struct.Struct(">I")
_SEQ = struct.Struct(">Q")


class EngineRecording(msgspec.Struct, frozen=True):
    """One engine of the demo. ``capture``: the recording's file name; the other names are the demo's."""

    name: str
    model: str
    capture: str
    about: str


ENGINES = (
    EngineRecording("full-attention", "tiny-llama", "truth-base", "one full-attention group, 60 blocks of 32 tokens"),
    EngineRecording("sliding-window", "tiny-gemma", "truth-hybrid64", "three sliding-window groups and a full one, 160 blocks"),
)


class RecordedFrame(msgspec.Struct, frozen=True):
    """One event frame as the engine sent it; ``at_s`` counts from the engine's first request."""

    at_s: float
    topic: str
    seq: int
    payload: bytes


class RecordedRequest(msgspec.Struct, frozen=True):
    """One request as the engine served it. ``after_reset``: the first one after the prefix cache was reset."""

    at_s: float
    tag: str
    token_ids: list[int]
    cache_salt: str | None
    cached_tokens: int
    after_reset: bool


class Recording(msgspec.Struct, frozen=True):
    """All that one engine sent and was sent, each in order of time."""

    engine: EngineRecording
    frames: tuple[RecordedFrame, ...]
    requests: tuple[RecordedRequest, ...]


class _Line(msgspec.Struct, omit_defaults=True):
    """One line of a requests file. Without a prompt it marks a reset."""

    t: float
    tag: str
    model: str | None = None
    kw: dict[str, str] | None = None
    prompt_token_ids: list[int] | None = None
    cached_tokens: int | None = None


def load(engine: EngineRecording) -> Recording:
    """Return a packaged recording."""
    folder = files("kvatlas.demo") / FOLDER
    lines = gzip.decompress((folder / f"{engine.capture}.requests.jsonl.gz").read_bytes()).splitlines()
    asked = [msgspec.json.decode(line, type=_Line) for line in lines]
    start_s = next(line.t for line in asked if line.prompt_token_ids is not None)
    frames = _frames(gzip.decompress((folder / f"{engine.capture}.bin.gz").read_bytes()), start_s)
    return Recording(engine, tuple(frames), tuple(_requests(asked, start_s)))


def _requests(lines: list[_Line], start_s: float) -> Iterator[RecordedRequest]:
    after_reset = False
    for line in lines:
        if line.prompt_token_ids is None:
            after_reset = True
            continue
        assert line.cached_tokens is not None
        salt = (line.kw or {}).get("cache_salt")
        yield RecordedRequest(line.t - start_s, line.tag, line.prompt_token_ids, salt, line.cached_tokens, after_reset)
        after_reset = False


def _frames(content: bytes, start_s: float) -> Iterator[RecordedFrame]:
    offset = 0
    while offset < len(content):
        received_ns, count = _RECORD_HEAD.unpack_from(content, offset)
        offset += _RECORD_HEAD.size
        parts: list[bytes] = []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(content, offset)
            offset += _LENGTH.size
            parts.append(content[offset : offset + length])
            offset += length
        topic, seq, payload = parts
        yield RecordedFrame(received_ns / 1e9 - start_s, topic.decode(), _SEQ.unpack(seq)[0], payload)


def pack(source: Path, target: Path) -> None:
    """Make the packaged files from full recordings. The same input gives the same bytes."""
    target.mkdir(parents=True, exist_ok=True)
    for engine in ENGINES:
        frames = (source / f"{engine.capture}.bin").read_bytes()
        (target / f"{engine.capture}.bin.gz").write_bytes(gzip.compress(frames, mtime=0))
        (target / f"{engine.capture}.requests.jsonl.gz").write_bytes(gzip.compress(_slim(source, engine), mtime=0))


def _slim(source: Path, engine: EngineRecording) -> bytes:
    lines = []
    for text in (source / f"{engine.capture}.requests.jsonl").read_bytes().splitlines():
        line = msgspec.json.decode(text, type=_Line)
        usage = msgspec.json.decode(text).get("usage")
        line.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"] if usage else None
        lines.append(msgspec.json.encode(line))
    return b"\n".join(lines) + b"\n"


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(__file__).parent / FOLDER)
