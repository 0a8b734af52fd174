"""approx-prefix-cache-producer: what was routed to an endpoint counts as held there."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.load import EngineReport
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.plugins import DecisionObserver, OutcomeObserver, PoolObserver, Producer
from kvatlas.route.prefix.approximate import ApproximatePrefixCache
from kvatlas.route.request import RouteRequest
from tests.unit.route.prefix.making import cycle, decision, endpoint, request, services

A, B, C = (endpoint(pod) for pod in "abc")
POOL = [A, B, C]


def producer(**parameters: Any) -> ApproximatePrefixCache:
    given = msgspec.convert(parameters, ApproximatePrefixCache.Parameters)
    made = ApproximatePrefixCache("approx", given, services())
    made.pool_changed(POOL)
    return made


def route(
    made: ApproximatePrefixCache,
    asked: RouteRequest,
    target: Endpoint,
    prefill: Endpoint | None = None,
    report: EngineReport | None = None,
) -> None:
    work = cycle(asked, POOL, report)
    made.produce(work)
    made.decided(work, decision(work, target, prefill))


def matches(made: ApproximatePrefixCache, asked: RouteRequest, pool: list[Endpoint] = POOL) -> PrefixMatches:
    work = cycle(asked, pool)
    made.produce(work)
    return work.matches["approx"]


def tokens(made: ApproximatePrefixCache, asked: RouteRequest) -> dict[str, int]:
    return {name.removeprefix("default/"): match.tokens for name, match in matches(made, asked).by_endpoint.items()}


def test_it_does_what_the_router_calls() -> None:
    made = producer()
    for kind in (Producer, DecisionObserver, OutcomeObserver, PoolObserver):
        assert isinstance(made, kind)


def test_what_was_sent_to_an_endpoint_is_matched_there() -> None:
    made = producer()
    assert tokens(made, request(range(200))) == {}
    route(made, request(range(200)), A)
    route(made, request(range(70)), B)
    found = matches(made, request(range(200)))
    assert found.by_endpoint[A.name] == PrefixMatch(200, MatchSource.HISTORY)
    assert (found.of(B.name).tokens, found.of(C.name).tokens) == (64, 0)  # B's second block ends at its prompt's end
    assert (found.block_size_tokens, found.blocks) == (64, 4)


def test_both_who_computes_the_prompt_and_who_decodes_are_remembered() -> None:
    made = producer()
    route(made, request(range(128)), A, prefill=B)
    assert tokens(made, request(range(128))) == {"a": 128, "b": 128}


def test_texts_are_matched_where_tokens_are_not_known() -> None:
    made = producer()
    route(made, request(text="x" * 1024, prompt_tokens_estimated=512), A)
    found = matches(made, request(text="x" * 512 + "y" * 512, prompt_tokens_estimated=512))
    assert (found.of(A.name).tokens, found.blocks * found.block_size_tokens) == (256, 512)


def test_without_tokens_and_text_nothing_is_matched_and_a_note_says_so() -> None:
    made, work = producer(), cycle(request(), POOL)
    made.produce(work)
    assert work.matches == {}
    assert work.notes == ["approx: neither tokens nor text of the prompt are known, nothing is matched"]
    made.decided(work, decision(work, A))
    assert made.stats().entries == 0


def test_a_prompt_that_goes_on_beyond_its_tokens_is_matched_against_its_whole_length() -> None:
    made = producer()
    route(made, request(range(640)), A)
    found = matches(made, request(range(128), tokens_complete=False, prompt_tokens_estimated=640))
    assert (found.of(A.name).tokens, found.blocks) == (128, 10)


def test_only_candidates_are_matched() -> None:
    made = producer()
    route(made, request(range(64)), A)
    assert matches(made, request(range(64)), [B, C]).by_endpoint == {}


@pytest.mark.parametrize(
    ("parameters", "report", "kept_tokens"),
    [
        ({}, EngineReport(at_s=0, gpu_blocks=12, block_size_tokens=16), 192),  # 12 blocks of 16 are 3 of 64
        ({}, EngineReport(at_s=0, gpu_blocks=2, block_size_tokens=128), 256),
        ({"lruCapacityPerServer": 5}, EngineReport(at_s=0, gpu_blocks=12), 320),  # of blocks of what size is not known
        ({"lruCapacityPerServer": 5}, None, 320),
        ({"lruCapacityPerServer": 5, "autoTune": False}, EngineReport(at_s=0, gpu_blocks=12, block_size_tokens=16), 320),
        ({"lruCapacityPerServer": 0}, None, 640),
    ],
)
def test_an_endpoint_is_taken_to_hold_as_much_as_its_cache_does(
    parameters: dict[str, Any], report: EngineReport | None, kept_tokens: int
) -> None:
    made = producer(**parameters)
    route(made, request(range(640)), A, report=report)
    assert tokens(made, request(range(640))) == {"a": kept_tokens}


@pytest.mark.parametrize(
    ("parameters", "size", "matched"),
    [
        ({}, 64, 1000),
        ({"blockSizeTokens": 128}, 128, 1000),
        ({"blockSizeTokens": 32}, 64, 1000),
        ({"blockSize": 256}, 256, 1000),
        ({"blockSizeTokens": 128, "blockSize": 256}, 128, 1000),
        ({"maxPrefixTokensToMatch": 200}, 64, 192),
        ({"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 2}, 64, 128),
        ({"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 0}, 64, 1000),
    ],
)
def test_parameters_mean_what_they_mean_in_llm_d(parameters: dict[str, Any], size: int, matched: int) -> None:
    made = producer(**parameters)
    route(made, request(range(1000)), A)
    found = matches(made, request(range(1000)))
    assert (found.block_size_tokens, found.of(A.name).tokens) == (size, matched)
    assert -(-matched // size) == found.blocks  # all that could be matched


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({"maxPrefixTokensToMatch": 63}, "maxPrefixTokensToMatch"), ({"historyBytesMax": "much"}, "historyBytesMax")],
)
def test_parameters_that_make_no_sense_are_refused(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"approx.{named}"):
        producer(**parameters)


@pytest.mark.parametrize("parameters", [{"blockSizeToken": 16}, {"lruCapacityPerServer": -1}, {"autoTune": "yes"}])
def test_parameters_are_strict(parameters: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        producer(**parameters)


def test_who_leaves_the_pool_or_gets_another_address_is_forgotten() -> None:
    made = producer()
    for one in POOL:
        route(made, request(range(64)), one)
    moved = msgspec.structs.replace(B, address="10.9.9.9")
    made.pool_changed([moved, C])
    assert tokens(made, request(range(64))) == {"c": 64}
    made.pool_changed(POOL)
    assert tokens(made, request(range(64))) == {"c": 64}
    assert made.stats().endpoints == 1


@pytest.mark.parametrize(("end", "known"), [(End.DONE, {"a": 64, "b": 64}), (End.UNREACHABLE, {"a": 64})])
def test_a_retry_that_went_well_is_history_of_who_served_it(end: End, known: dict[str, int]) -> None:
    made = producer()
    work = cycle(request(range(64)), POOL)
    made.produce(work)
    chosen = decision(work, A)
    made.decided(work, chosen)
    made.finished(chosen, B.name, Outcome(end=end))
    assert tokens(made, request(range(64))) == known


def test_a_retry_at_an_endpoint_that_left_meanwhile_is_not_remembered() -> None:
    made = producer()
    work = cycle(request(range(64)), POOL)
    made.produce(work)
    made.pool_changed([A])
    made.finished(decision(work, A), B.name, Outcome(end=End.DONE))
    assert made.stats().endpoints == 0


def test_history_is_bounded_in_bytes() -> None:
    made = producer(historyBytesMax="10KiB")
    for start in range(50):
        route(made, request(range(start * 1000, start * 1000 + 640)), POOL[start % 3])
    stats = made.stats()
    assert stats.bytes_estimated <= 10 << 10
    assert stats.entries + stats.evicted_bytes == 500
