"""What a real vLLM 0.32 did with 300 requests, one after the other: the simulated engine does the same, block by block."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path

import pytest

from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.ingest.recording import read_frames
from kvatlas.keys.engine_hashes import UNSET_SEED, HashScheme
from kvatlas.sim.choice import Core, make_engines, why_no_native
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import Engines, EngineSpec, Job, Kind
from kvatlas.types import BlockRemoved, BlockStored

CAPTURES = Path(__file__).parent.parent / "data" / "vllm-0.32"
BLOCK_TOKENS = 32
SPEC = EngineSpec(costs=EngineCosts(step_s=0.01, prefill_token_s=1e-5), gpu_blocks=60, block_size_tokens=BLOCK_TOKENS)
SCHEME = HashScheme("sha256_cbor", UNSET_SEED)
CLEARED = "cleared"
CORES = ["reference"] + ["native"] * (why_no_native() is None)

Told = tuple[str, tuple[int, ...]] | str
"""Hashes that were stored, one hash that was removed, or all of them."""


def recorded_events() -> list[Told]:
    told: list[Told] = []
    for frame in read_frames(CAPTURES / "truth-base.bin"):
        for batch in VllmDecoder().decode(frame.payload).batches:
            for event in batch.events:
                if isinstance(event, BlockStored):
                    told.append(("stored", tuple(event.hashes)))
                elif isinstance(event, BlockRemoved):
                    told += [("removed", (block,)) for block in event.hashes]
                else:
                    told.append(CLEARED)
    return told


def engine_hashes(tokens: list[int], salt: str | None) -> array[int]:
    """As the engine computes them, so that the simulation's events can be compared with the engine's."""
    digest = SCHEME.none_hash()
    keys = array("Q")
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        extra = [("cache_salt", salt)] if salt and start == 0 else []
        digest = SCHEME.block_hash(digest, tokens[start : start + BLOCK_TOKENS], extra)
        keys.append(int.from_bytes(digest[-8:], "big"))
    return keys


def simulated(engines: Engines) -> tuple[dict[str, int], list[Told]]:
    """Return the cached tokens of each request, and the events."""
    engine = engines.join(SPEC, 0.0)
    cached: dict[str, int] = {}
    told: list[Told] = []
    now_s, cleared = 0.0, False
    for number, line in enumerate((CAPTURES / "truth-base.requests.jsonl").read_text().splitlines()):
        request = json.loads(line)
        if "prompt_token_ids" not in request:
            cleared = engines.reset_cache(engine, now_s)
            assert cleared
            continue
        prompt, answer = request["prompt_token_ids"], request["output_token_ids"]
        keys = engine_hashes(prompt + answer, request["kw"].get("cache_salt"))
        engines.add(engine, Job(number, keys, len(prompt), len(answer)), now_s)
        now_s, happenings = engines.run(math.inf)
        told += [CLEARED] * cleared  # the engine tells it with its next step
        cleared = False
        for happening in happenings:
            if happening.kind is Kind.SCHEDULED:
                cached[request["tag"]] = happening.first
            elif happening.kind is Kind.STORED:
                told.append(("stored", tuple(keys[happening.first : happening.first + happening.many])))
            elif happening.kind is Kind.REMOVED:
                told += [("removed", (key,)) for key in happening.keys]
    return cached, told


@pytest.mark.parametrize("core", CORES)
def test_cached_tokens_and_events_equal_a_real_engines(core: Core) -> None:
    cached, told = simulated(make_engines(core))
    requests = [json.loads(line) for line in (CAPTURES / "truth-base.requests.jsonl").read_text().splitlines()]
    truth = {
        request["tag"]: request["usage"]["prompt_tokens_details"]["cached_tokens"] for request in requests if "usage" in request
    }
    assert len(truth) == 300
    assert cached == truth
    assert told == recorded_events()
