"""An engine's event stream without an engine: a publisher speaks vLLM's protocol over real ZeroMQ, and an index follows it.

    python examples/offline_publisher.py

Shows what the index does with stored blocks, an eviction, a history that it missed, and an engine that restarts. The payloads
are those of vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from kvatlas import Indexer, Query, load_config
from kvatlas.ingest.publisher import EventPublisher

MODEL = "tiny-llama"
TOPIC = f"kv@engine-a@{MODEL}"
BLOCK = 16
PROMPT = list(range(100, 100 + 6 * BLOCK))


def payload(*events: dict[str, Any]) -> bytes:
    """Return a batch as vLLM sends it: time, events, data-parallel rank."""
    return msgspec.msgpack.encode([time.time(), list(events), 0])


def stored(hashes: Sequence[int], tokens: Sequence[int], parent: int | None = None) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(tokens),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


def removed(*hashes: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU"}


async def applied(indexer: Indexer, engine: EventPublisher, timeout_s: float = 10.0) -> None:
    """Wait until the index has everything that the engine has published. TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            pod = indexer.pods()[0]
            if pod.state == "fresh" and pod.next_seq == engine.next_seq and pod.queue_depth == 0:
                return
            await asyncio.sleep(0.005)


def show(indexer: Indexer, what: str) -> None:
    pod = indexer.score(Query([*PROMPT, 1], MODEL)).pods[0]
    status = indexer.pods()[0]
    print(
        f"{what:48} {pod.predicted_cached_tokens:3} of {len(PROMPT) + 1} tokens cached"
        f"  ({status.state}, {status.replays} replays, {status.restarts} restarts)"
    )


async def main() -> None:
    logging.getLogger("kvatlas").setLevel(logging.ERROR)  # its warnings (disconnected, restarted) tell the same story
    async with AsyncExitStack() as process:
        engine = await process.enter_async_context(EventPublisher(replay_endpoint="tcp://127.0.0.1:0", topic=TOPIC))
        # before anybody listens: these frames are lost on the way, but the engine keeps them
        await engine.publish(payload(stored([1, 2], PROMPT[: 2 * BLOCK])))
        await engine.publish(payload(stored([3, 4], PROMPT[2 * BLOCK : 4 * BLOCK], parent=2)))

        address = f"{{endpoint: '{engine.endpoint}', replayEndpoint: '{engine.replay_endpoint}'}}"
        with Indexer(load_config(overrides=[f"zmq.engines=[{address}]"])) as indexer:
            await engine.wait_for_subscriber()
            await applied(indexer, engine)
            show(indexer, "published before anybody listened, replayed:")

            await engine.publish(payload(stored([5, 6], PROMPT[4 * BLOCK :], parent=4)))
            await applied(indexer, engine)
            show(indexer, "the rest of the prompt, live:")

            await engine.publish(payload(removed(5)))
            await applied(indexer, engine)
            show(indexer, "block 5 evicted, so block 6 helps nobody now:")

            await process.aclose()  # the engine ends, and another process takes its place
            async with EventPublisher(engine.endpoint, engine.replay_endpoint, topic=TOPIC) as restarted:
                await restarted.publish(payload(stored([1], PROMPT[:BLOCK])))
                await applied(indexer, restarted)
                show(indexer, "a restarted engine has what it says from now on:")


if __name__ == "__main__":
    asyncio.run(main())
