"""A real service on free loopback ports, and event frames as a vLLM sends them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import grpc
import httpx
import msgspec

from kvatlas.config import load_config
from kvatlas.proto.kvatlas.v1 import kvatlas_pb2, kvatlas_pb2_grpc
from kvatlas.serve.service import Addresses, serve

MODEL = "tiny-llama"
BLOCK = 16
FREE = ("api.port=0", "api.grpcPort=0", "zmq.bind=false")
PROMPT = list(range(1000, 1000 + 5 * BLOCK))
"""Five whole blocks."""


@asynccontextmanager
async def running(*overrides: str) -> AsyncIterator[Addresses]:
    """Serve with these settings for as long as the block lasts, then stop and wait for the end."""
    stop = asyncio.Event()
    addresses: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
    config = load_config(environ={}, overrides=(*FREE, *overrides))
    task = asyncio.create_task(serve(config, stop=stop, started=addresses.set_result))
    done, _ = await asyncio.wait({task, addresses}, return_when="FIRST_COMPLETED", timeout=20)
    if task in done:
        await task
    try:
        yield addresses.result()
    finally:
        stop.set()
        await asyncio.wait_for(task, 20)


def client(addresses: Addresses, **options: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=addresses.http, timeout=20, **options)  # type: ignore[arg-type]


def stored(pod: str, seq: int, tokens: Sequence[int] = PROMPT, first_hash: int = 1) -> kvatlas_pb2.PublishEventsRequest:
    """Return the frame in which ``pod`` says that it stored a prompt from its first block on."""
    event = {
        "type": "BlockStored",
        "block_hashes": [first_hash + number for number in range(len(tokens) // BLOCK)],
        "parent_block_hash": None,
        "token_ids": list(tokens),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return kvatlas_pb2.PublishEventsRequest(
        topic=f"kv@{pod}@{MODEL}", seq=seq, payload=msgspec.msgpack.encode([time.time(), [event], None])
    )


async def publish(
    addresses: Addresses, frames: Iterable[kvatlas_pb2.PublishEventsRequest], token: str | None = None
) -> kvatlas_pb2.PublishEventsResponse:
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    async with grpc.aio.insecure_channel(addresses.grpc) as channel:
        stub = kvatlas_pb2_grpc.KvAtlasStub(channel)
        return await stub.PublishEvents(iter(frames), metadata=metadata)


async def filled(addresses: Addresses) -> None:
    """Let pod-a hold all of PROMPT and pod-b its first two blocks; return when both are seen."""
    answer = await publish(addresses, [stored("pod-a", 0), stored("pod-b", 0, PROMPT[: 2 * BLOCK], 100)])
    assert (answer.accepted, answer.rejected) == (2, 0)
    async with client(addresses) as http:
        for _ in range(200):
            found = (await http.post("/v1/candidates", json={"model": MODEL, "token_ids": PROMPT})).json()
            if len(found["pods"]) == 2:
                return
            await asyncio.sleep(0.02)
    raise AssertionError("published events did not reach the index")
