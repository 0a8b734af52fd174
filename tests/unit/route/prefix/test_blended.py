"""blended-prefix-cache-producer: events where they can be relied on, else history, and each match says which."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Cycle
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.parameters import read_parameters
from kvatlas.route.plugins import DecisionObserver, OutcomeObserver, PoolObserver, Producer
from kvatlas.route.prefix.blended import BlendedPrefixCache
from kvatlas.route.request import RouteRequest
from kvatlas.types import StaleReason
from tests.unit.route.prefix.fleet import CORES, Fleet, running_fleet
from tests.unit.route.prefix.making import cycle, decision, endpoint, request, services

A, B, C = (endpoint(pod, address=f"10.0.0.{number}") for number, pod in enumerate("abc"))
POOL = [A, B, C]
PROMPT = list(range(1000, 1201))
"""Three whole blocks of history, 50 of the index, and a token."""
EVENTS, HISTORY = MatchSource.EVENTS, MatchSource.HISTORY


@pytest.fixture(params=CORES)
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    with running_fleet(request.param) as made:
        yield made


def producer(fleet: Fleet | None, **parameters: Any) -> BlendedPrefixCache:
    given = read_parameters(BlendedPrefixCache.Parameters, parameters, "parameters")
    made = BlendedPrefixCache("blended", given, services(index=None if fleet is None else fleet.index))
    made.pool_changed(POOL)
    return made


def ask(made: BlendedPrefixCache, asked: RouteRequest) -> Cycle:
    work = cycle(asked, POOL, now_s=100.0)
    made.produce(work)
    return work


def route(made: BlendedPrefixCache, asked: RouteRequest, target: Endpoint) -> None:
    work = ask(made, asked)
    made.decided(work, decision(work, target))


def matches(made: BlendedPrefixCache, asked: RouteRequest) -> PrefixMatches:
    return ask(made, asked).matches["blended"]


def lose_an_event(fleet: Fleet, pod: str, lost: list[int]) -> None:
    fleet.serve(pod, lost, lost=True)
    fleet.serve(pod, [7] * 8)


def test_it_does_what_the_router_calls(fleet: Fleet) -> None:
    made = producer(fleet)
    for kind in (Producer, DecisionObserver, OutcomeObserver, PoolObserver):
        assert isinstance(made, kind)


def test_events_count_where_they_are_fresh_and_history_where_there_are_none(fleet: Fleet) -> None:
    made = producer(fleet, speculativeIndexing=False)
    for one in (A, B):
        route(made, request(PROMPT), one)
    fleet.serve("a", PROMPT[:100])  # the rest was evicted, or never came that far
    found = matches(made, request(PROMPT))
    assert found.by_endpoint == {
        A.name: PrefixMatch(100, EVENTS, cached_tokens=100),
        B.name: PrefixMatch(200, HISTORY),
    }
    assert (found.block_size_tokens, found.blocks) == (4, 50)


def test_a_fresh_endpoint_that_holds_nothing_holds_nothing_whatever_was_sent_there(fleet: Fleet) -> None:
    made = producer(fleet, speculativeIndexing=False)
    fleet.serve("a", [5] * 8)
    route(made, request(PROMPT), A)
    assert matches(made, request(PROMPT)).of(A.name) == PrefixMatch(0, EVENTS, cached_tokens=0)


def test_history_takes_over_where_events_were_lost_and_events_when_they_are_complete_again(fleet: Fleet) -> None:
    made = producer(fleet, speculativeIndexing=False)
    fleet.serve("a", [5] * 8)
    route(made, request(PROMPT), A)
    lose_an_event(fleet, "a", PROMPT)
    assert matches(made, request(PROMPT)).of(A.name) == PrefixMatch(200, HISTORY, stale=StaleReason.GAP)
    fleet.engine("a").reset()  # an emptied cache needs no past
    fleet.serve("a", PROMPT[:40])
    assert matches(made, request(PROMPT)).of(A.name) == PrefixMatch(40, EVENTS, cached_tokens=40)


def test_of_a_stale_endpoint_the_larger_of_both_counts(fleet: Fleet) -> None:
    made = producer(fleet, speculativeIndexing=False)
    fleet.serve("a", PROMPT)
    route(made, request(PROMPT[:64]), A)
    lose_an_event(fleet, "a", [9] * 8)
    found = matches(made, request(PROMPT)).of(A.name)
    assert (found.tokens, found.source, found.stale) == (200, EVENTS, StaleReason.GAP)
    assert found.worth == 100  # what a stale stream holds counts by half
    route(made, request(PROMPT[:128]), A)
    assert matches(made, request(PROMPT)).of(A.name).worth == 128  # of so much history is sure


def test_stale_events_alone_are_better_than_nothing(fleet: Fleet) -> None:
    """A router that has just started has no history yet."""
    fleet.serve("a", PROMPT)
    lose_an_event(fleet, "a", [9] * 8)
    found = matches(producer(fleet), request(PROMPT)).of(A.name)
    assert (found.tokens, found.source, found.stale) == (200, EVENTS, StaleReason.GAP)


def test_history_is_kept_while_events_are_fresh(fleet: Fleet) -> None:
    made = producer(fleet, speculativeIndexing=False)
    fleet.serve("a", PROMPT)
    route(made, request(PROMPT), A)
    assert matches(made, request(PROMPT)).of(A.name).source is EVENTS
    assert made.stats().entries == 4


def test_without_tokens_all_is_from_history_and_a_note_says_why(fleet: Fleet) -> None:
    made = producer(fleet)
    fleet.serve("a", PROMPT)
    asked = request(text="x" * 1024, tokens_problem="busy")
    route(made, asked, B)
    work = ask(made, asked)
    assert work.matches["blended"].by_endpoint == {B.name: PrefixMatch(256, HISTORY)}
    assert work.matches["blended"].block_size_tokens == 64
    assert work.notes == ["blended: the tokens are not known (busy), so nothing is matched by events"]


def test_without_an_index_all_is_from_history() -> None:
    made = producer(None)
    route(made, request(PROMPT), A)
    work = ask(made, request(PROMPT))
    assert work.matches["blended"].by_endpoint == {A.name: PrefixMatch(201, HISTORY)}
    assert work.notes == ["blended: there is no index, so nothing is matched by events"]


def test_with_neither_tokens_nor_text_there_is_no_match_at_all(fleet: Fleet) -> None:
    assert ask(producer(fleet), request()).matches == {}


def test_promises_bridge_the_time_to_the_events(fleet: Fleet) -> None:
    made = producer(fleet)
    fleet.serve("a", [5] * 8)
    route(made, request(PROMPT), A)
    assert matches(made, request(PROMPT)).of(A.name) == PrefixMatch(200, EVENTS, speculative_tokens=200, cached_tokens=200)


def test_nothing_is_promised_to_who_sends_no_events(fleet: Fleet) -> None:
    made = producer(fleet)
    route(made, request(PROMPT), A)
    assert fleet.index.stats().speculative == 0
    assert matches(made, request(PROMPT)).of(A.name).source is HISTORY


def test_a_retry_that_went_well_is_history_of_who_served_it(fleet: Fleet) -> None:
    made = producer(fleet)
    work = ask(made, request(PROMPT))
    chosen = decision(work, A)
    made.decided(work, chosen)
    made.finished(chosen, B.name, Outcome(end=End.DONE))
    assert matches(made, request(PROMPT)).by_endpoint.keys() == {A.name, B.name}


def test_who_leaves_the_pool_is_forgotten(fleet: Fleet) -> None:
    made = producer(fleet)
    route(made, request(PROMPT), A)
    made.pool_changed([B, C])
    assert made.stats().endpoints == 0


def test_matches_of_history_are_in_blocks_of_the_index() -> None:
    with running_fleet("auto", "keys.blockSize=48") as fleet:
        made = producer(fleet)
        fleet.serve("c", [1] * 48)
        route(made, request(PROMPT), A)
        found = matches(made, request(PROMPT))
        assert (found.of(A.name).tokens, found.block_size_tokens, found.blocks) == (192, 48, 4)


def test_parameters_are_those_of_both_kinds(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match=r"blended\.maxPrefixTokensToMatch"):
        producer(fleet, maxPrefixTokensToMatch=1)
    with pytest.raises(ConfigError, match=r"blended\.speculativeTTLMax"):
        producer(fleet, speculativeTTL="3s", speculativeTTLMax="2s")
    with pytest.raises(ConfigError, match="indexerConfig"):
        producer(fleet, indexerConfig={})


def test_the_example_of_the_documentation(fleet: Fleet) -> None:
    """docs/prefix-matching.md"""
    made, prompt = producer(fleet, speculativeIndexing=False), PROMPT[:100]
    for one in POOL:
        route(made, request(prompt), one)
    fleet.serve("a", prompt[:40])
    fleet.serve("b", prompt[:8])
    lose_an_event(fleet, "b", prompt)
    found = matches(made, request(prompt))
    assert [(found.of(one.name).tokens, found.of(one.name).source) for one in POOL] == [
        (40, EVENTS),
        (100, HISTORY),
        (100, HISTORY),
    ]
    assert [found.of(one.name).stale for one in POOL] == [None, StaleReason.GAP, None]
