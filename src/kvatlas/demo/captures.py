"""The packaged recordings of two vLLM 0.32 engines: event frames with their times, and the requests that caused them.

``python -m kvatlas.demo.captures tests/data/vllm-0.32`` makes the packaged files from the recordings that the tests use: the
frames as they are, of each request what the demo asks and compares.
"""

from __future__ import annotations

import gzip
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from kvatlas.backtest import RecordedRequest, read_requests
from kvatlas.ingest.recording import read_frames
from kvatlas.types import Frame

FOLDER = "captures"


class RecordedEngine(msgspec.Struct, frozen=True):
    """One engine of the demo. ``capture``: its recording's file name; pod and model are what the demo calls them."""

    pod: str
    model: str
    capture: str
    about: str


ENGINES = (
    RecordedEngine("full-attention", "tiny-llama", "truth-base", "one full-attention group, 60 blocks of 32 tokens"),
    RecordedEngine("sliding-window", "tiny-gemma", "truth-hybrid64", "3 sliding-window groups and a full one, 160 blocks"),
)


class Recording(msgspec.Struct, frozen=True):
    """All that one engine sent and was sent, each in order of time. ``start_s``: unix time of its first request."""

    engine: RecordedEngine
    frames: tuple[Frame, ...]
    requests: tuple[RecordedRequest, ...]
    start_s: float


def load(engine: RecordedEngine, folder: Path) -> Recording:
    """Unpack an engine's packaged recording into ``folder``, as ``kvatlas replay`` reads it, and return it."""
    for name in _names(engine):
        (folder / name).write_bytes(gzip.decompress((files("kvatlas.demo") / FOLDER / f"{name}.gz").read_bytes()))
    frames, requests = (folder / name for name in _names(engine))
    asked = read_requests(requests)
    return Recording(engine, tuple(read_frames(frames)), tuple(asked), asked[0].sent_s)


def pack(source: Path, target: Path) -> None:
    """Make the packaged files from full recordings."""
    for engine in ENGINES:
        frames, requests = _names(engine)
        _write(target / frames, (source / frames).read_bytes())
        lines = (source / requests).read_bytes().splitlines()
        _write(target / requests, b"".join(msgspec.json.encode(_slim(msgspec.json.decode(line))) + b"\n" for line in lines))


def _names(engine: RecordedEngine) -> tuple[str, str]:
    return f"{engine.capture}.bin", f"{engine.capture}.requests.jsonl"


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {name: record[name] for name in ("t", "tag", "model", "kw", "prompt_token_ids") if name in record}
    if "usage" in record:
        kept["usage"] = {"prompt_tokens_details": {"cached_tokens": record["usage"]["prompt_tokens_details"]["cached_tokens"]}}
    return kept


def _write(path: Path, content: bytes) -> None:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content, mtime=0))


if __name__ == "__main__":
    pack(Path(sys.argv[1]), Path(__file__).parent / FOLDER)
