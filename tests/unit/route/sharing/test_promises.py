"""Blocks that one router promised count as promised for others, until events confirm them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from kvatlas.route.cycle import Candidate
from kvatlas.route.endpoint import Endpoint
from kvatlas.route.load import Load
from kvatlas.route.matches import PrefixMatch
from kvatlas.route.parameters import read_parameters
from kvatlas.route.plugins import RemembersRoutes
from kvatlas.route.prefix.approximate import ApproximatePrefixCache
from kvatlas.route.prefix.blended import BlendedPrefixCache
from kvatlas.route.prefix.precise import PROMISED, PrecisePrefixCache
from tests.unit.route.prefix.fleet import CORES, Fleet, running_fleet
from tests.unit.route.prefix.making import cycle, decision, endpoint, request, services

A, B = endpoint("a", address="10.0.0.1"), endpoint("b", address="10.0.0.2")
PROMPT = list(range(1000, 1021))
"""Five whole blocks and a token."""


@pytest.fixture(params=CORES)
def fleets(request: pytest.FixtureRequest) -> Iterator[tuple[Fleet, Fleet]]:
    """What two routers know of the same engines."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(running_fleet(request.param)) for _ in range(2))
        yield first, second


def precise(fleet: Fleet, **parameters: Any) -> PrecisePrefixCache:
    given = read_parameters(PrecisePrefixCache.Parameters, {"speculativeIndexing": True, **parameters}, "parameters")
    made = PrecisePrefixCache("precise", given, services(index=fleet.index))
    made.pool_changed([A, B])
    return made


def told(made: PrecisePrefixCache | BlendedPrefixCache, target: Endpoint) -> dict[str, Any]:
    """Let one router decide; return what it tells."""
    work = cycle(request(PROMPT), [A, B], now_s=100.0)
    made.produce(work)
    made.decided(work, decision(work, target))
    return dict(made.told(work))


def learn(made: PrecisePrefixCache | BlendedPrefixCache, kind: str, chain: Any, target: Endpoint = A) -> None:
    made.learn(kind, [Candidate(target, Load())], chain, 100.0)


def found(made: PrecisePrefixCache | BlendedPrefixCache, one: Endpoint) -> PrefixMatch:
    work = cycle(request(PROMPT), [A, B], now_s=100.0)
    made.produce(work)
    return work.match(one.name)


def test_what_one_router_promised_is_expected_by_the_other_until_events_come(fleets: tuple[Fleet, Fleet]) -> None:
    first, second = (precise(fleet) for fleet in fleets)
    learn(second, PROMISED, told(first, A)[PROMISED])
    assert (found(second, A).tokens, found(second, A).speculative_tokens) == (20, 20)
    assert found(second, B).tokens == 0
    fleets[1].serve("a", PROMPT)
    assert (found(second, A).tokens, found(second, A).speculative_tokens) == (20, 0)


def test_what_events_have_confirmed_is_not_told(fleets: tuple[Fleet, Fleet]) -> None:
    for fleet in fleets:
        fleet.serve("a", PROMPT[:12])
    first, second = (precise(fleet) for fleet in fleets)
    chain = told(first, A)[PROMISED]
    assert len(chain) == 2
    learn(second, PROMISED, chain)
    assert (found(second, A).tokens, found(second, A).speculative_tokens) == (20, 8)
    fleets[0].serve("a", PROMPT)
    assert told(first, A) == {}


def test_promises_of_others_end_with_time(fleets: tuple[Fleet, Fleet]) -> None:
    first, second = (precise(fleet, speculativeTTL="500ms") for fleet in fleets)
    learn(second, PROMISED, told(first, A)[PROMISED])
    fleets[1].clock.now_s += 0.6
    assert found(second, A).tokens == 0


def test_a_router_that_does_not_speculate_takes_no_promises(fleets: tuple[Fleet, Fleet]) -> None:
    second = precise(fleets[1], speculativeIndexing=False)
    learn(second, PROMISED, told(precise(fleets[0]), A)[PROMISED])
    assert found(second, A).tokens == 0


def test_blended_producers_tell_and_learn_both_kinds(fleets: tuple[Fleet, Fleet]) -> None:
    for fleet in fleets:
        fleet.serve("a", [5] * 4)
    first, second = (
        BlendedPrefixCache("blended", BlendedPrefixCache.Parameters(), services(index=fleet.index)) for fleet in fleets
    )
    for made in (first, second):
        made.pool_changed([A, B])
    chains = told(first, A)
    assert set(chains) == {"history", "promised"}
    for kind, chain in chains.items():
        learn(second, kind, chain)
    assert found(second, A).speculative_tokens == 20
    assert second.stats().entries == len(chains["history"])


def test_producers_are_found_to_remember_routes(fleets: tuple[Fleet, Fleet]) -> None:
    approximate = ApproximatePrefixCache("a", ApproximatePrefixCache.Parameters(), services())
    for made in (approximate, precise(fleets[0])):
        assert isinstance(made, RemembersRoutes)
