"""The circuit breaker: when calls pass, on a clock that the test moves."""

from __future__ import annotations

import random
import threading

import pytest

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.remote.breaker import Breaker, BreakerState, Turn
from kvatlas.tokens.remote.calls import Deadline, Places
from tests.models.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(3, 10.0, clock)


def entered(breaker: Breaker) -> Turn:
    turn = breaker.enter()
    assert turn is not None
    return turn


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        with entered(breaker) as turn:
            turn.failed()


def test_failures_in_a_row_open_it_and_time_lets_one_call_try(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 2)
    assert breaker.state is BreakerState.CLOSED
    fail(breaker)
    assert breaker.state is BreakerState.OPEN
    assert breaker.enter() is None
    assert breaker.retry_in_s == 10.0
    clock.now_s += 9.9
    assert breaker.enter() is None
    clock.now_s += 0.1
    assert (breaker.state, breaker.retry_in_s) == (BreakerState.HALF_OPEN, 0.0)
    trial = entered(breaker)
    assert breaker.enter() is None, "one at a time"
    trial.succeeded()
    assert breaker.state is BreakerState.CLOSED
    assert breaker.enter() is not None


def test_a_success_between_failures_starts_the_count_again(breaker: Breaker) -> None:
    fail(breaker, 2)
    entered(breaker).succeeded()
    fail(breaker, 2)
    assert breaker.state is BreakerState.CLOSED


def test_a_trial_that_fails_opens_it_for_another_while(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now_s += 10
    fail(breaker)
    assert breaker.state is BreakerState.OPEN
    assert breaker.retry_in_s == 10.0


def test_a_trial_that_learns_nothing_leaves_its_place_to_the_next(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, 3)
    clock.now_s += 10
    with pytest.raises(KeyError), entered(breaker):
        raise KeyError
    assert breaker.state is BreakerState.HALF_OPEN
    assert breaker.enter() is not None


def test_what_a_call_of_an_earlier_time_reports_changes_nothing(breaker: Breaker, clock: Clock) -> None:
    slow, slower = entered(breaker), entered(breaker)
    fail(breaker, 3)
    slow.succeeded()
    assert breaker.state is BreakerState.OPEN, "it began before the failures"
    clock.now_s += 10
    trial = entered(breaker)
    with slower:
        slower.failed()
    assert breaker.enter() is None, "the trial still runs"
    trial.succeeded()
    assert breaker.state is BreakerState.CLOSED


def test_only_the_first_report_of_a_call_counts(breaker: Breaker) -> None:
    with entered(breaker) as turn:
        for _ in range(5):
            turn.failed()
        turn.succeeded()
    fail(breaker, 1)
    assert breaker.state is BreakerState.CLOSED
    fail(breaker, 1)
    assert breaker.state is BreakerState.OPEN


@pytest.mark.parametrize("seed", range(8))
def test_threads_find_at_most_one_trial(seed: int) -> None:
    clock = Clock()
    breaker = Breaker(1, 1.0, clock)
    fail(breaker)
    clock.now_s += 1
    passed: list[Turn] = []
    start = threading.Barrier(8)

    def attempt(delay: random.Random) -> None:
        start.wait()
        for _ in range(delay.randrange(1, 20)):
            turn = breaker.enter()
            if turn is not None:
                passed.append(turn)

    threads = [threading.Thread(target=attempt, args=(random.Random(seed * 8 + number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 1, f"seed {seed}"


def test_a_call_that_finds_no_place_in_its_time_is_told_so() -> None:
    places = Places(1, "tokens.renderer.callsMax")
    with places.taken(Deadline(1)):
        with pytest.raises(TokenizationError, match=r"tokens\.renderer\.callsMax") as caught, places.taken(Deadline(0.02)):
            pass
        assert caught.value.reason is TokenizationReason.BUSY
    with places.taken(Deadline(0)):
        pass


def test_places_go_to_who_waits_longest() -> None:
    places = Places(1, "x")
    order: list[int] = []

    def call(number: int) -> None:
        with places.taken(Deadline(10)):
            order.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    with places.taken(Deadline(0)):
        for waiting, thread in enumerate(threads):
            thread.start()
            while len(places._waiting) == waiting:
                pass
    with places.taken(Deadline(10)):
        order.append(-1)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4, 5, -1]
    assert (places._free, len(places._waiting)) == (1, 0)


def test_no_place_is_lost_between_calls_that_give_up_and_ones_that_end() -> None:
    places = Places(2, "x")

    def calls(random_waits: random.Random) -> None:
        for _ in range(200):
            try:
                with places.taken(Deadline(random_waits.random() * 0.001)):
                    pass
            except TokenizationError:
                pass

    threads = [threading.Thread(target=calls, args=(random.Random(seed),)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (places._free, len(places._waiting)) == (2, 0)


def test_a_share_of_a_deadline_ends_before_it() -> None:
    clock = Clock()
    deadline = Deadline(9, clock)
    first = deadline.share(3)
    assert first.left_s == 3
    clock.now_s += 6
    assert (first.left_s, deadline.left_s, deadline.share(1).left_s) == (0, 3, 3)
