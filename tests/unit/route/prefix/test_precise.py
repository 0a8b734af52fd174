"""precise-prefix-cache-producer: what engines' events say, and promises until they say it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Cycle
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.matches import MatchSource, PrefixMatch
from kvatlas.route.parameters import read_parameters
from kvatlas.route.plugins import DecisionObserver, PoolObserver, Producer
from kvatlas.route.prefix.precise import PrecisePrefixCache
from kvatlas.route.request import RouteRequest
from kvatlas.types import (
    CPU,
    BlockStored,
    DpRank,
    EngineHash,
    EventBatch,
    MultimodalItem,
    PodId,
    StaleReason,
    Stream,
)
from tests.unit.route.prefix.fleet import CORES, Fleet, running_fleet
from tests.unit.route.prefix.making import cycle, decision, endpoint, request, services

A, B, C = (endpoint(pod, address=f"10.0.0.{number}") for number, pod in enumerate("abc"))
POOL = [A, B, C]
PROMPT = list(range(1000, 1021))
"""Five whole blocks and a token."""


@pytest.fixture(params=CORES)
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with running_fleet(request.param) as made:
        yield made


def producer(fleet: Fleet | None, pool: list[Endpoint] = POOL, **parameters: Any) -> PrecisePrefixCache:
    given = read_parameters(PrecisePrefixCache.Parameters, parameters, "parameters")
    made = PrecisePrefixCache("precise", given, services(index=None if fleet is None else fleet.index))
    made.pool_changed(pool)
    return made


def ask(made: PrecisePrefixCache, asked: RouteRequest, pool: list[Endpoint] = POOL, now_s: float = 100.0) -> Cycle:
    work = cycle(asked, pool, now_s=now_s)
    made.produce(work)
    return work


def match(made: PrecisePrefixCache, asked: RouteRequest, one: Endpoint, pool: list[Endpoint] = POOL) -> PrefixMatch | None:
    found = ask(made, asked, pool).matches.get("precise")
    return None if found is None else found.by_endpoint.get(one.name)


def test_it_does_what_the_router_calls(fleet: Fleet) -> None:
    made = producer(fleet)
    for kind in (Producer, DecisionObserver, PoolObserver):
        assert isinstance(made, kind)


# -- matches --------------------------------------------------------------------------------------------------------------


def test_it_says_what_events_say(fleet: Fleet) -> None:
    fleet.serve("a", PROMPT)
    fleet.serve("b", PROMPT[:12])
    fleet.serve("c", [1] * 8)
    work = ask(producer(fleet), request(PROMPT))
    found = work.matches["precise"]
    assert (found.block_size_tokens, found.blocks, work.notes) == (4, 5, [])
    assert found.by_endpoint == {
        A.name: PrefixMatch(20, MatchSource.EVENTS, cached_tokens=20),
        B.name: PrefixMatch(12, MatchSource.EVENTS, cached_tokens=12),
        C.name: PrefixMatch(0, MatchSource.EVENTS, cached_tokens=0),
    }


def test_the_prediction_is_what_the_engine_reports(fleet: Fleet) -> None:
    prompt = PROMPT[:20]  # whole blocks: the engine computes the last one again
    fleet.serve("a", prompt)
    work = ask(producer(fleet), request(prompt))
    assert work.matches["precise"].of(A.name).tokens == 20
    assert decision(work, A).predicted_cached_tokens == fleet.engine("a").cached_tokens(prompt) == 16


def test_where_only_the_first_tokens_are_known_matches_are_lower_bounds(fleet: Fleet) -> None:
    fleet.serve("a", PROMPT)
    work = ask(producer(fleet), request(PROMPT[:8], tokens_complete=False, prompt_tokens_estimated=40))
    assert work.matches["precise"].blocks == 10
    assert work.matches["precise"].of(A.name) == PrefixMatch(8, MatchSource.EVENTS)
    assert decision(work, A).predicted_cached_tokens == 8


def test_tiers_are_told_and_weigh_less(fleet: Fleet) -> None:
    stream = Stream(PodId("a"))
    tokens = request(PROMPT).token_ids
    assert tokens is not None
    hashes = tuple(map(EngineHash, range(5)))
    on_gpu = BlockStored(hashes[:2], None, tokens[:8], 4)
    on_cpu = BlockStored(hashes, None, tokens[:20], 4, tier=CPU)
    fleet.index.index.apply(stream, EventBatch((on_gpu, on_cpu), model="tiny-llama"))
    found = match(producer(fleet), request(PROMPT), A)
    assert found is not None
    assert (found.tokens, found.tiers, found.worth) == (20, {"gpu": 8, "cpu": 12}, 17)  # 8 + 12 * 0.8


def test_a_stale_stream_says_why_and_is_worth_less(fleet: Fleet) -> None:
    fleet.serve("a", PROMPT)
    fleet.serve("a", [2] * 8, lost=True)
    fleet.serve("a", [3] * 8)
    found = match(producer(fleet), request(PROMPT), A)
    assert found == PrefixMatch(20, MatchSource.EVENTS, stale=StaleReason.GAP, cached_tokens=20, worth_tokens=10)


def test_salt_adapter_and_images_are_part_of_what_is_asked(fleet: Fleet) -> None:
    fleet.serve("a", PROMPT)
    made = producer(fleet)
    for other in ({"cache_salt": "s"}, {"lora_name": "l"}, {"multimodal": (MultimodalItem("cat", 0, 2),)}):
        found = match(made, request(PROMPT, **other), A)
        assert found is not None
        assert found.tokens == 0


def test_an_adapter_of_which_events_know_nothing_is_held_by_nobody(fleet: Fleet) -> None:
    """The client names the adapter as its model; streams are known by their base model's name."""
    fleet.serve("a", PROMPT)
    work = ask(producer(fleet), request(PROMPT, model="poet", lora_name="poet"))
    assert work.matches["precise"].by_endpoint == {A.name: PrefixMatch(0, MatchSource.EVENTS)}


# -- what it does not know ------------------------------------------------------------------------------------------------


def test_endpoints_without_events_are_missing_and_named(fleet: Fleet) -> None:
    fleet.serve("a", PROMPT)
    pool = [A, *(endpoint(f"silent{number}", address=f"10.1.0.{number}") for number in range(5))]
    work = ask(producer(fleet, pool), request(PROMPT), pool)
    assert work.matches["precise"].by_endpoint.keys() == {A.name}
    named = "default/silent0, default/silent1, default/silent2 and 2 more"
    assert work.notes == [f"precise: no event has come from {named}"]


def test_a_model_that_events_name_otherwise_is_no_silent_miss(fleet: Fleet) -> None:
    for pod in "abc":
        fleet.serve(pod, PROMPT)
    work = ask(producer(fleet), request(PROMPT, model="llama"))
    assert work.matches == {}
    assert work.notes == ["precise: events of default/a, default/b, default/c name another model than 'llama' (setting models)"]


def test_without_tokens_nothing_is_guessed_from_the_text(fleet: Fleet) -> None:
    work = ask(producer(fleet), request(text="x" * 1000, tokens_problem="timeout"))
    assert work.matches == {}
    assert work.notes == ["precise: the tokens are not known (timeout), so nothing is matched by events"]


def test_without_an_index_nothing_is_matched() -> None:
    made = producer(None, speculativeIndexing=True)
    work = ask(made, request(PROMPT))
    assert (work.matches, work.notes) == ({}, ["precise: there is no index, so nothing is matched by events"])
    made.decided(work, decision(work, A))


def test_a_prompt_that_has_no_keys_is_routed_with_a_note() -> None:
    overrides = ("keys.mode=engine", "keys.engine.algorithm=sha256_cbor")
    with running_fleet("auto", *overrides) as fleet:
        work = ask(producer(fleet), request(PROMPT, lora_name="unknown"))
        assert work.matches == {}
        assert "keys.engine.loras" in work.notes[0]


# -- who is who -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known_as", ["pod-1", "default/vllm-1", "vllm-1", "10.0.0.7:8000", "10.0.0.7"])
def test_an_endpoint_is_found_by_whatever_name_its_events_have(fleet: Fleet, known_as: str) -> None:
    one = endpoint("pod-1", name="default/vllm-1", address="10.0.0.7")
    fleet.serve(known_as, PROMPT)
    found = match(producer(fleet, [one, A]), request(PROMPT), one, [one, A])
    assert found is not None
    assert found.tokens == 20


def test_names_that_could_mean_two_pods_mean_none(fleet: Fleet) -> None:
    pool = [
        endpoint("pod-1", name="blue/vllm", address="10.0.0.7", port=8000),
        endpoint("pod-2", name="green/vllm", address="10.0.0.7", port=8001),
    ]
    fleet.serve("vllm", PROMPT)
    fleet.serve("10.0.0.7", PROMPT)
    work = ask(producer(fleet, pool), request(PROMPT), pool)
    assert work.matches == {}


def test_ranks_of_a_pod_are_told_apart(fleet: Fleet) -> None:
    ranks = [endpoint("a", name=f"default/a#dp{rank}", rank=rank) for rank in range(2)]
    tokens = request(PROMPT).token_ids
    assert tokens is not None
    stored = BlockStored(tuple(map(EngineHash, range(5))), None, tokens[:20], 4)
    fleet.index.index.apply(Stream(PodId("a"), DpRank(1)), EventBatch((stored,), model="tiny-llama"))
    fleet.index.index.apply(Stream(PodId("a"), DpRank(0)), EventBatch((), model="tiny-llama"))
    found = ask(producer(fleet, ranks), request(PROMPT), ranks).matches["precise"]
    assert [found.of(one.name).tokens for one in ranks] == [0, 20]


def test_who_leaves_the_pool_loses_its_other_names(fleet: Fleet) -> None:
    one = endpoint("pod-1", name="default/vllm-1", address="10.0.0.7")
    fleet.serve("10.0.0.7", PROMPT)
    made = producer(fleet, [one])
    other = endpoint("pod-2", name="default/vllm-2", address="10.0.0.7", port=8001)
    made.pool_changed([other])
    assert match(made, request(PROMPT), other, [other]) is not None
    made.pool_changed([one, other])
    assert match(made, request(PROMPT), other, [one, other]) is None


# -- promises -------------------------------------------------------------------------------------------------------------


def decide(made: PrecisePrefixCache, target: Endpoint, prefill: Endpoint | None = None, now_s: float = 100.0) -> None:
    work = ask(made, request(PROMPT), now_s=now_s)
    made.decided(work, decision(work, target, prefill))


def test_promised_blocks_count_until_events_confirm_them(fleet: Fleet) -> None:
    fleet.serve("b", [5] * 4)
    made = producer(fleet, speculativeIndexing=True)
    decide(made, A, prefill=B)
    found = ask(made, request(PROMPT)).matches["precise"]
    assert {found.of(one.name).speculative_tokens for one in (A, B)} == {20}
    assert found.of(C.name).tokens == 0
    fleet.serve("a", PROMPT)
    found = ask(made, request(PROMPT)).matches["precise"]
    assert (found.of(A.name).tokens, found.of(A.name).speculative_tokens) == (20, 0)
    assert (found.of(B.name).tokens, found.of(B.name).speculative_tokens) == (20, 20)


def test_promises_end_after_their_time(fleet: Fleet) -> None:
    made = producer(fleet, speculativeIndexing=True, speculativeTTL="500ms")
    decide(made, A)
    fleet.clock.now_s += 0.4
    assert match(made, request(PROMPT), A) is not None
    fleet.clock.now_s += 0.2
    assert match(made, request(PROMPT), A) is None


def test_what_events_have_confirmed_is_not_promised_again(fleet: Fleet) -> None:
    fleet.serve("a", PROMPT)
    fleet.serve("b", PROMPT[:8])
    made = producer(fleet, speculativeIndexing=True)
    decide(made, A)
    assert fleet.index.stats().speculative == 0
    decide(made, B)
    assert fleet.index.stats().speculative == 3


def test_nothing_is_promised_unless_asked_for(fleet: Fleet) -> None:
    made = producer(fleet)
    decide(made, A)
    assert fleet.index.stats().speculative == 0


def test_a_promise_goes_to_the_name_that_events_have(fleet: Fleet) -> None:
    one = endpoint("pod-1", name="default/vllm-1", address="10.0.0.7")
    fleet.serve("10.0.0.7:8000", [5] * 4)
    made = producer(fleet, [one], speculativeIndexing=True)
    work = ask(made, request(PROMPT), [one])
    made.decided(work, decision(work, one))
    fleet.serve("10.0.0.7:8000", PROMPT)
    assert fleet.index.stats().speculative == 0


def test_events_outrank_a_promise_that_was_made_under_another_name(fleet: Fleet) -> None:
    one = endpoint("pod-1", name="default/vllm-1", address="10.0.0.7")
    made = producer(fleet, [one], speculativeIndexing=True)
    work = ask(made, request(PROMPT), [one])
    made.decided(work, decision(work, one))
    fleet.serve("10.0.0.7:8000", PROMPT[:8])
    found = match(made, request(PROMPT), one, [one])
    assert found is not None
    assert (found.tokens, found.speculative_tokens) == (8, 0)


def test_promises_last_as_long_as_events_are_seen_to_take(fleet: Fleet) -> None:
    fleet.serve("a", [5] * 4)
    made = producer(fleet, speculativeIndexing=True)
    assert made.lag.ttl_s == 2.0
    for number in range(12):
        prompt = [number + 10] * 8
        work = ask(made, request(prompt), now_s=fleet.clock.now_s)
        made.decided(work, decision(work, A))
        for _ in range(14):  # others are decided meanwhile
            fleet.clock.now_s += 0.1
            ask(made, request([1] * 4), now_s=fleet.clock.now_s)
        fleet.serve("a", prompt)
        for _ in range(2):
            fleet.clock.now_s += 0.1
            ask(made, request([1] * 4), now_s=fleet.clock.now_s)
    assert made.lag.ttl_s == pytest.approx(2 * 1.5, abs=0.25)


def test_a_block_that_was_promised_before_is_not_waited_for_again(fleet: Fleet) -> None:
    """Its event answers the first request, and would come too soon after the second."""
    fleet.serve("a", [5] * 4)
    made = producer(fleet, speculativeIndexing=True)
    for _ in range(2):
        decide(made, A)
    for _ in range(4):
        ask(made, request([1] * 4), now_s=140.0)
    assert made.lag.never_came == 1


# -- parameters -----------------------------------------------------------------------------------------------------------


def test_llm_ds_samples_are_taken_and_what_has_no_effect_is_said(fleet: Fleet) -> None:
    made = producer(
        fleet,
        tokenProcessorConfig={"blockSize": 64, "hashSeed": "42"},
        indexerConfig={"kvBlockIndexConfig": {"enableMetrics": True, "metricsLoggingInterval": 60_000_000_000}},
        kvEventsConfig={"topicFilter": "kv@", "concurrency": 4, "discoverPods": False, "zmqEndpoint": "tcp://*:5557"},
        speculativeIndexing=True,
        speculativeTTL="2s",
    )
    assert made.notes == (
        "precise: tokenProcessorConfig.blockSize 64 has no effect, the index has keys.blockSize 4",
        "precise: tokenProcessorConfig.hashSeed '42' has no effect, the index has keys.seed ''",
        "precise: indexerConfig has no effect, the index is configured by index, keys, tieredCache and tokens",
        "precise: kvEventsConfig has no effect, events come from where zmq and sources say",
    )
    fleet.serve("a", PROMPT)
    assert match(made, request(PROMPT), A) is not None


def test_what_agrees_with_the_index_needs_no_note(fleet: Fleet) -> None:
    assert producer(fleet, tokenProcessorConfig={"blockSizeTokens": 4, "hashSeed": ""}).notes == ()


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"blockSizeTokens": 64}, "blockSizeTokens"),
        ({"hashSeed": "42"}, "hashSeed"),
        ({"hashAlgorithm": "cbor-fnv"}, "hashAlgorithm"),
    ],
)
def test_keys_that_are_shared_with_llm_d_have_to_be_the_same(given: dict[str, Any], field: str) -> None:
    with running_fleet("auto", "keys.mode=llmd-xxh64") as fleet:
        producer(fleet, tokenProcessorConfig={"blockSize": 4, "hashAlgorithm": "xxh64"})
        with pytest.raises(ConfigError, match=f"precise.tokenProcessorConfig.{field}"):
            producer(fleet, tokenProcessorConfig=given)


def test_the_longest_time_to_live_is_not_the_shorter_one(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match=r"precise\.speculativeTTLMax"):
        producer(fleet, speculativeTTL="1m")
    assert producer(fleet, speculativeTTL="0s").lag.ttl_s == 2.0


@pytest.mark.parametrize("parameters", [{"speculative": True}, {"indexerConfig": {"size": 1}}, {"speculativeTTL": 2}])
def test_parameters_are_strict(fleet: Fleet, parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        producer(fleet, **parameters)
