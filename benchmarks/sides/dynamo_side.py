"""NVIDIA Dynamo's index in this process: ``dynamo._core.RadixTree``, fed with JSON events, one a call (it takes no batches).

A block has a hash of its tokens alone (``compute_block_hash_for_seq``) and the engine's hash; queries are lists of the former.
The tree does its work in one thread of its own; pinned to one core with the caller, as here, it is at its best.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from dynamo._core import RadixTree, compute_block_hash_for_seq  # type: ignore[import-not-found]  # in its own environment

from benchmarks.sides.measured import MeasuredSide
from benchmarks.streams import BLOCK_TOKENS, Chain


class _Dumped(msgspec.Struct):
    """One event of a dump; the event itself stays bytes, as ``apply_event`` takes it."""

    worker_id: int
    event: msgspec.Raw


class DynamoSide(MeasuredSide):
    def __init__(self) -> None:
        self._tree = RadixTree()
        self._dumped = msgspec.json.Decoder(_Dumped)

    def versions(self) -> dict[str, str]:
        return {"ai-dynamo-runtime": version("ai-dynamo-runtime")}

    def new(self) -> None:
        self._tree = RadixTree()

    def stored(self, chain: Chain, blocks_per_event: int, start: int, stop: int) -> list[bytes]:
        token_hashes = self.keys(chain)
        payloads = []
        for first in range(start, stop, blocks_per_event):
            last = min(stop, first + blocks_per_event)
            blocks = [
                {"block_hash": block, "tokens_hash": tokens}
                for block, tokens in zip(chain.hashes[first:last], token_hashes[first:last], strict=True)
            ]
            parent = chain.hashes[first - 1] if first else None
            payloads.append(_event({"stored": {"parent_hash": parent, "blocks": blocks}}))
        return payloads

    def removed(self, chain: Chain, hashes_per_event: int, events_per_payload: int) -> list[bytes]:
        """Return one payload an event: a payload of many does not exist in this form."""
        hashes = chain.hashes[::-1]
        return [
            _event({"removed": {"block_hashes": hashes[at : at + hashes_per_event]}})
            for at in range(0, len(hashes), hashes_per_event)
        ]

    def apply(self, pod: int, payloads: list[bytes]) -> None:
        apply_event = self._tree.apply_event
        for payload in payloads:
            apply_event(pod, payload)

    def check(self, entries: int) -> None:
        pass  # it does not count them; that both sides answer the same is checked by those who ask

    def settle(self) -> None:
        self._tree.find_matches([1])  # goes through the same queue

    def keys(self, chain: Chain) -> list[int]:
        hashes: list[int] = compute_block_hash_for_seq(chain.tokens.tolist(), BLOCK_TOKENS)
        return hashes

    def find(self, keys: Any) -> Mapping[Any, int]:
        scores: Mapping[Any, int] = self._tree.find_matches(keys).scores
        return scores

    def score(self, tokens: Any) -> Mapping[Any, int]:
        scores: Mapping[Any, int] = self._tree.find_matches(compute_block_hash_for_seq(tokens, BLOCK_TOKENS)).scores
        return scores

    def buffer(self, values: Sequence[int], code: str) -> Any:
        """Return the list: arrays are taken too, and take twice as long (they are read as sequences)."""
        return values

    def hash_us(self, prompts: list[int], rounds: int) -> list[float]:
        """Return the time from tokens to keys alone."""
        asked = [Chain(prompt).tokens.tolist() for prompt in prompts]
        return self._latencies_us(lambda tokens: compute_block_hash_for_seq(tokens, BLOCK_TOKENS), asked, rounds)

    def by_pod(self, answer: Mapping[Any, int]) -> dict[int, int]:
        return {pod: blocks for (pod, _), blocks in answer.items()}

    def remove(self, pod: int) -> None:
        self._tree.remove_worker(pod)

    def clean_up(self) -> None:
        pass  # nothing is left for later

    def snapshot(self) -> bytes:
        """Return the dump's JSON events, one a line."""
        return "\n".join(self._tree.dump_tree_as_events()).encode()

    def snapshots(self, fleet: dict[str, Any]) -> dict[str, float]:
        measured = super().snapshots(fleet)
        snapshot = self.snapshot()
        self.new()
        return {**measured, "restore_parsed_s": self._timed(lambda: self._restore_parsed(snapshot))["cpu_s"]}

    def _restore_parsed(self, snapshot: bytes) -> None:
        """Restore with Python's json, as one would without knowing better."""
        for line in snapshot.split(b"\n"):
            dumped = json.loads(line)
            self._tree.apply_event(dumped["worker_id"], json.dumps(dumped["event"]).encode())
        self.settle()

    def restore(self, snapshot: bytes) -> None:
        apply_event = self._tree.apply_event
        decode = self._dumped.decode
        for line in snapshot.split(b"\n"):
            dumped = decode(line)
            apply_event(dumped.worker_id, bytes(dumped.event))
        self.settle()


def _event(data: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"event_id": 0, "data": data, "dp_rank": 0})
