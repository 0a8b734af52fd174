"""kvatlas's native index, fed with an engine's own msgpack payloads; and, for what Dynamo's service does, with ZMQ frames."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import zmq

from benchmarks.sides.measured import TURN_PAYLOADS, MeasuredSide
from benchmarks.streams import BLOCK_TOKENS, Chain
from kvatlas.index.native import NativeIndex
from kvatlas.index.protocol import IndexLimits
from kvatlas.keys import KeySchema
from kvatlas.types import PodId, Stream

MODEL = "m"


class KvatlasSide(MeasuredSide):
    def __init__(self) -> None:
        self._schema = KeySchema(block_size_tokens=BLOCK_TOKENS)
        self._streams: dict[int, Stream] = {}
        self._numbers: dict[str, int] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._index = self._empty()

    def versions(self) -> dict[str, str]:
        return {"kvatlas": version("kvatlas"), "core": self._index.core}

    def _empty(self) -> NativeIndex:
        limits = IndexLimits(ttl_s=1e9, blocks_max=100_000_000, bytes_max=1 << 40)
        return NativeIndex(self._schema, limits, time.monotonic)

    def _stream(self, pod: int) -> Stream:
        stream = self._streams.get(pod)
        if stream is None:
            stream = self._streams[pod] = Stream(PodId(f"10.0.{pod // 256}.{pod % 256}:8000"))
            self._numbers[stream.pod] = pod
        return stream

    def new(self) -> None:
        self._index = self._empty()

    def stored(self, chain: Chain, blocks_per_event: int, start: int, stop: int) -> list[bytes]:
        return list(chain.stored(blocks_per_event, start, stop))

    def removed(self, chain: Chain, hashes_per_event: int, events_per_payload: int) -> list[bytes]:
        return list(chain.removed(hashes_per_event, events_per_payload))

    def apply(self, pod: int, payloads: list[bytes]) -> None:
        applied = self._index.apply_payloads(self._stream(pod), payloads, decoder="vllm", model=MODEL)
        assert applied.taken == len(payloads), f"only {applied.taken} of {len(payloads)} payloads were read natively"

    def check(self, entries: int) -> None:
        held = self._index.stats().entries
        assert held == entries, f"{held} entries are held, not {entries}"

    def settle(self) -> None:
        pass  # applied means seen

    def keys(self, chain: Chain) -> list[int]:
        keys, _ = self._schema.extend(self._schema.root(MODEL), chain.tokens)
        return list(keys)

    def find(self, keys: Any) -> Mapping[Any, int]:
        found: Mapping[Any, int] = self._index.find(keys).to_dict()
        return found

    def score(self, tokens: Any) -> Mapping[Any, int]:
        scores: Mapping[Any, int] = self._index.score(tokens, model=MODEL).to_dict()
        return scores

    def buffer(self, values: Sequence[int], code: str) -> Any:
        return array(code, values)

    def by_pod(self, answer: Mapping[Any, int]) -> dict[int, int]:
        return {self._numbers[pod]: blocks for pod, blocks in answer.items()}

    def remove(self, pod: int) -> None:
        self._index.forget(self._stream(pod))

    def clean_up(self) -> None:
        while self._index.expire():
            pass

    def remove_pods(self, fleet: dict[str, Any]) -> float:
        took_ms = super().remove_pods(fleet)
        left = self._index.stats().bytes_estimated
        assert left < 1 << 20, f"{left:,} bytes were not given back"
        return took_ms

    def snapshot(self) -> bytes:
        return bytes(self._index.snapshot())

    def restore(self, snapshot: bytes) -> None:
        self._index.restore(snapshot)

    def estimated(self) -> int:
        """Return the index's own estimate of its bytes."""
        estimated: int = self._index.stats().bytes_estimated
        return estimated

    def connect(self, endpoints: list[str]) -> None:
        """Subscribe to publishers of frames; a frame's topic is its pod's number."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        for endpoint in endpoints:
            self._socket.connect(endpoint)

    def receive(self, frames: int) -> dict[str, float]:
        """Read frames from the sockets into the index, until so many have come."""
        return self._timed(lambda: self._receive(frames))

    def disconnect(self) -> None:
        assert self._socket is not None
        assert self._context is not None
        self._socket.close(linger=0)
        self._context.term()

    def _receive(self, frames: int) -> None:
        """Take what waits, at most so much, and hand it over by pod."""
        assert self._socket is not None
        receive = self._socket.recv_multipart
        left = frames
        while left:
            waiting: dict[bytes, list[bytes]] = {}
            topic, _, payload = receive()
            taken = 1
            waiting[topic] = [payload]
            try:
                while taken < 8 * TURN_PAYLOADS:
                    topic, _, payload = receive(zmq.NOBLOCK)
                    taken += 1
                    waiting.setdefault(topic, []).append(payload)
            except zmq.Again:
                pass
            for name, payloads in waiting.items():
                self.apply(int(name), payloads)
            left -= taken
