"""kvatlas inside a scheduler: no service, no network. Two engines report what they cache; a scheduler places three requests.

    python examples/scheduler_library.py

In production events come from vLLM or SGLang over ZeroMQ (``zmq.engines`` in the settings). To run anywhere, this example
writes them in the generic format and hands them over in the process.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence

from kvatlas import CacheScorer, Frame, Indexer, PodId, Query, Stream, load_config
from kvatlas.ingest.decode.generic import EventType, GenericEvent, encode_msgpack

MODEL = "tiny-llama"
BLOCK = 16
SYSTEM_PROMPT = list(range(1000, 1000 + 8 * BLOCK))
MANUAL = list(range(5000, 5000 + 40 * BLOCK))


class Scheduler:
    """Sends each request to the engine that has least to compute: tokens that wait there, and what the cache lacks."""

    def __init__(self, indexer: Indexer, waiting_tokens: Mapping[PodId, int]) -> None:
        self._indexer = indexer
        self._scorer = CacheScorer(indexer, MODEL)
        self.waiting_tokens = dict(waiting_tokens)

    def place(self, token_ids: Sequence[int]) -> PodId:
        """Choose an engine, and note what will be cached there before its events say so."""
        cached = {pod.pod: 0 if pod.stale else pod.predicted_cached_tokens for pod in self._scorer.get_candidates(token_ids)}
        cost = {pod: waiting + len(token_ids) - cached.get(pod, 0) for pod, waiting in self.waiting_tokens.items()}
        best = min(cost, key=lambda pod: (cost[pod], pod))
        self.waiting_tokens[best] += len(token_ids) - cached.get(best, 0)
        # a burst of similar prompts would otherwise be spread before the first one's blocks are announced
        self._indexer.promise(Query(token_ids, MODEL), Stream(best))
        return best


class Engine:
    """Tells the index what it holds, as an engine's event stream would."""

    def __init__(self, indexer: Indexer, pod: str) -> None:
        self._indexer = indexer
        self._pod = PodId(pod)
        self._seq = 0

    def holds(self, prompt: Sequence[int]) -> None:
        """Announce a prompt whose blocks are all cached."""
        self._publish(GenericEvent(type=EventType.PREFIX_CACHED, prefix=array("I", prompt), block_size_tokens=BLOCK))

    def evicts(self, prompt: Sequence[int]) -> None:
        """Announce that the last block of a prompt is gone."""
        self._publish(GenericEvent(type=EventType.BLOCK_EVICTED, prefix=array("I", prompt), block_size_tokens=BLOCK))

    def _publish(self, event: GenericEvent) -> None:
        frame = Frame(f"kv@{self._pod}@{MODEL}", self._seq, encode_msgpack([event]), time.time_ns())
        self._seq += 1
        self._indexer.publish(frame, decoder="generic")


def main() -> None:
    settings = load_config(overrides=["zmq.bind=false"])
    with Indexer(settings) as indexer:
        a, b = Engine(indexer, "engine-a"), Engine(indexer, "engine-b")
        a.holds(SYSTEM_PROMPT)
        b.holds(SYSTEM_PROMPT + MANUAL)
        indexer.drain()

        for pod in CacheScorer(indexer, MODEL).get_candidates([*SYSTEM_PROMPT, *MANUAL, 7]):
            print(f"{pod.pod} would find {pod.predicted_cached_tokens} tokens of the manual's prompt cached, score {pod.score}")

        scheduler = Scheduler(indexer, {PodId("engine-a"): 0, PodId("engine-b"): 300})
        print("a question about the manual  ->", scheduler.place([*SYSTEM_PROMPT, *MANUAL, 7, 8, 9]))
        print("a short question             ->", scheduler.place([*SYSTEM_PROMPT, 1, 2, 3]))

        b.evicts(SYSTEM_PROMPT + MANUAL[:BLOCK])  # the manual's first block: what comes after it helps nobody now
        indexer.drain()
        for pod in CacheScorer(indexer, MODEL).get_candidates([*SYSTEM_PROMPT, *MANUAL, 7]):
            print(f"after an eviction {pod.pod} would find {pod.predicted_cached_tokens} tokens")


if __name__ == "__main__":
    main()
