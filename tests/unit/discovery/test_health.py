"""Who is in rotation, on a clock that the test moves."""

from __future__ import annotations

import pytest

from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.discovery.health import Health, HealthLimits, HealthState
from kvatlas.route.endpoint import EndpointName
from kvatlas.tokens.remote.breaker import Turn
from tests.models.clock import Clock

A = EndpointName("default/a:80")
B = EndpointName("default/b:80")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def changes() -> list[tuple[EndpointName, HealthState]]:
    return []


@pytest.fixture
def health(clock: Clock, changes: list[tuple[EndpointName, HealthState]]) -> Health:
    limits = HealthLimits(failures_max=3, retry_after_s=5.0, polls_failed_max=2)
    health = Health(limits, clock, lambda name, state: changes.append((name, state)))
    health.pool_changed(pool_from_urls(["http://a", "http://b"]).endpoints)
    return health


def entered(health: Health, name: EndpointName = A) -> Turn:
    turn = health.enter(name)
    assert turn is not None
    return turn


def fail(health: Health, times: int) -> None:
    for _ in range(times):
        entered(health).failed()


def test_requests_that_fail_in_a_row_take_an_endpoint_out_and_one_that_succeeds_brings_it_back(
    health: Health, clock: Clock, changes: list[tuple[EndpointName, HealthState]]
) -> None:
    fail(health, 2)
    assert health.healthy(A)
    fail(health, 1)
    assert (health.healthy(A), health.healthy(B)) == (False, True)
    assert health.states() == {A: HealthState.FAILING, B: HealthState.HEALTHY}
    assert health.enter(A) is None
    clock.now_s += 5
    assert (health.healthy(A), health.state(A)) == (True, HealthState.TRIAL)
    trial = entered(health)
    assert not health.healthy(A), "one request tries at a time"
    trial.succeeded()
    assert (health.healthy(A), health.state(A)) == (True, HealthState.HEALTHY)
    assert changes == [(A, HealthState.FAILING), (A, HealthState.HEALTHY)]


def test_a_trial_that_fails_keeps_it_out(health: Health, clock: Clock) -> None:
    fail(health, 3)
    clock.now_s += 5
    fail(health, 1)
    assert health.state(A) is HealthState.FAILING
    clock.now_s += 4.9
    assert not health.healthy(A)


def test_polls_that_find_nobody_take_it_out_until_one_is_answered(
    health: Health, changes: list[tuple[EndpointName, HealthState]]
) -> None:
    health.polled(A, False)
    health.polled(A, True)
    health.polled(A, False)
    assert health.healthy(A)
    health.polled(A, False)
    health.polled(A, False)
    assert (health.healthy(A), health.state(A)) == (False, HealthState.UNREACHABLE)
    health.polled(A, True)
    assert health.healthy(A)
    assert changes == [(A, HealthState.UNREACHABLE), (A, HealthState.HEALTHY)]


def test_metrics_that_answer_do_not_bring_back_who_fails_requests(health: Health) -> None:
    fail(health, 3)
    health.polled(A, True)
    assert health.state(A) is HealthState.FAILING


def test_what_is_known_goes_with_the_endpoint_and_with_its_address(health: Health) -> None:
    fail(health, 3)
    health.pool_changed(pool_from_urls(["http://a", "http://b"]).endpoints)
    assert not health.healthy(A), "it stayed"
    health.pool_changed(pool_from_urls(["http://a?metricsHost=h:1", "http://b"]).endpoints)
    assert not health.healthy(A), "requests go where they went"
    health.pool_changed(pool_from_urls(["https://a:80", "http://b"]).endpoints)
    assert health.healthy(A), "another server"
    fail(health, 3)
    health.pool_changed(pool_from_urls(["http://b"]).endpoints)
    assert health.states() == {B: HealthState.HEALTHY}


def test_an_endpoint_that_is_not_in_the_pool_is_healthy(health: Health) -> None:
    stranger = EndpointName("default/stranger")
    health.polled(stranger, False)
    with entered(health, stranger) as turn:
        turn.failed()
    assert health.healthy(stranger)
    assert health.state(stranger) is HealthState.HEALTHY
