"""An engine in real time, without its API: tokens at the ends of steps, events before tokens, tiers, aborts."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from kvatlas.keys.engine import EngineKeys
from kvatlas.keys.engine_hashes import HashScheme
from kvatlas.sim.costs import EngineCosts
from kvatlas.sim.engines import EngineSpec, TierSpec
from kvatlas.sim.live.engine import End, Generation, LiveEngine
from kvatlas.sim.live.kv_events import KvEvents
from kvatlas.sim.live.metrics import EngineMetrics
from kvatlas.sim.reference import ReferenceEngines

SPEC = EngineSpec(costs=EngineCosts(step_s=0.01, prefill_token_s=0.001), gpu_blocks=64, block_size_tokens=4)
KEYS = EngineKeys(HashScheme("sha256_cbor", "0"), 4)


class Told:
    """What was published, and how many tokens there were of a generation then."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.produced: list[int] = []
        self.watched: Generation | None = None

    async def publish(self, payload: bytes) -> None:
        self.events += msgspec.msgpack.decode(payload)[1]
        self.produced.append(self.watched.produced if self.watched else 0)


@asynccontextmanager
async def live(spec: EngineSpec = SPEC, told: Told | None = None) -> AsyncIterator[LiveEngine]:
    engine = LiveEngine(
        ReferenceEngines(),
        spec,
        events=KvEvents(spec.block_size_tokens, [tier.name for tier in spec.tiers]),
        publish=(told or Told()).publish,
        metrics=EngineMetrics("tiny", spec.block_size_tokens, spec.gpu_blocks),
        speed=100,
    )
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def generation(number: int, prompt: int, output: int, first: int = 1) -> Generation:
    tokens = array("I", range(first, first + prompt + output))
    return Generation(number, tokens, prompt, array("Q", KEYS.keys(tokens, "tiny")), None)


async def ended(*generations: Generation) -> None:
    for one in generations:
        while one.end is None:
            await one.wait(one.output_tokens)


async def test_tokens_come_one_by_one() -> None:
    async with live() as engine:
        one = generation(1, 20, 5)
        engine.submit(one)
        seen = []
        while one.end is None:
            await one.wait(one.produced)
            seen.append(one.produced)
    assert one.end is End.FINISHED
    assert seen[-1] == 5
    assert seen == sorted(set(seen))


async def test_requests_that_come_together_are_computed_together() -> None:
    async with live() as engine:
        several = [generation(number, 8, 6, first=number * 100) for number in range(1, 9)]
        for one in several:
            engine.submit(one)
        await ended(*several)
        assert engine.state.busy_s < 8 * 6 * SPEC.costs.step_s


async def test_what_a_prompt_did_to_the_cache_is_published_before_its_first_token() -> None:
    told = Told()
    async with live(told=told) as engine:
        one = told.watched = generation(1, 20, 3)
        engine.submit(one)
        await ended(one)
    assert told.produced[0] == 0
    assert [event["block_hashes"] for event in told.events] == [one.keys[:5].tolist()]
    assert told.events[0]["token_ids"] == one.tokens[:20].tolist()


async def test_an_aborted_request_leaves_nothing_behind_and_others_go_on() -> None:
    spec = msgspec.structs.replace(SPEC, costs=EngineCosts(step_s=1.0, prefill_token_s=0))
    async with live(spec) as engine:
        one, two = generation(1, 20, 40), generation(2, 20, 2, first=500)
        engine.submit(one)
        await one.wait(0)
        engine.abort(one)
        engine.submit(two)
        await ended(two)
        assert two.end is End.FINISHED
        assert one.produced < one.output_tokens
        assert engine.state.running == engine.state.blocks_used == 0


async def test_what_does_not_fit_is_refused() -> None:
    async with live() as engine:
        one = generation(1, 300, 5)
        engine.submit(one)
        await ended(one)
        assert one.end is End.REFUSED


async def test_blocks_that_left_the_gpu_are_loaded_from_a_tier() -> None:
    told = Told()
    tier = TierSpec(name="cpu", blocks=1000, load_block_s=0.01, latency_s=0.1)
    async with live(msgspec.structs.replace(SPEC, tiers=(tier,)), told) as engine:
        for number in range(1, 5):
            other = generation(number, 200, 1, first=number * 1000)
            engine.submit(other)
            await ended(other)
        again = generation(9, 200, 1, first=1000)
        engine.submit(again)
        await ended(again)
    assert again.cached_tokens == 196
    media = {event["medium"] for event in told.events}
    assert media == {"GPU", "CPU"}
    assert any(event["type"] == "BlockRemoved" for event in told.events)


async def test_an_engine_whose_steps_cost_nothing_serves_all_that_comes() -> None:
    free = msgspec.structs.replace(SPEC, costs=EngineCosts(step_s=0, prefill_token_s=0))
    async with live(free) as engine:
        asked = [generation(number, 8, 3, number * 100) for number in range(1, 30)]
        for one in asked:
            engine.submit(one)
            await asyncio.sleep(0)
        await ended(*asked)
    assert {one.end for one in asked} == {End.FINISHED}


async def test_after_its_end_nothing_is_taken() -> None:
    async with live() as engine:
        under_way = generation(1, 20, 5)
        engine.submit(under_way)
        await under_way.wait(0)
    late = generation(2, 20, 5)
    engine.submit(late)
    assert late.end is End.STOPPED
    assert under_way.end in (End.STOPPED, End.FINISHED)
