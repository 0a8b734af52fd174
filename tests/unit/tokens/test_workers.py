"""Threads that tokenize: bounded, and equal work is done once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.workers import Workers


@pytest.fixture
def workers() -> Iterator[Workers[int]]:
    made: Workers[int] = Workers(1, 2, "test")
    yield made
    made.close()


def test_equal_work_in_flight_is_done_once(workers: Workers[int]) -> None:
    go, runs = threading.Event(), []

    def work() -> int:
        runs.append(1)
        go.wait(10)
        return 7

    first, second = workers.submit("a", work), workers.submit("a", work)
    go.set()
    assert (first.result(10), second.result(10), len(runs), workers.shared) == (7, 7, 1, 1)


def test_what_ended_is_done_again(workers: Workers[int]) -> None:
    assert workers.submit("a", lambda: 1).result(10) == 1
    assert workers.submit("a", lambda: 2).result(10) == 2
    assert workers.in_flight == 0


def test_beyond_the_bound_work_is_refused_and_room_comes_back(workers: Workers[int]) -> None:
    go = threading.Event()
    taken = [workers.submit(name, lambda: int(go.wait(10))) for name in "abc"]
    with pytest.raises(TokenizationError, match=r"tokens\.queueMax") as raised:
        workers.submit("d", lambda: 1)
    assert raised.value.reason is TokenizationReason.BUSY
    go.set()
    assert [future.result(10) for future in taken] == [1, 1, 1]
    assert workers.submit("d", lambda: 1).result(10) == 1


def test_a_failure_reaches_everybody_who_waits(workers: Workers[int]) -> None:
    go = threading.Event()

    def work() -> int:
        go.wait(10)
        raise TokenizationError(TokenizationReason.BAD_TEXT, "text", "is bad", "send good text")

    futures = [workers.submit("a", work) for _ in range(3)]
    go.set()
    for future in futures:
        with pytest.raises(TokenizationError, match="is bad"):
            future.result(10)


def test_closing_fails_what_waits_and_refuses_what_comes() -> None:
    workers: Workers[int] = Workers(1, 2, "test")
    go, begun = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        return int(go.wait(10))

    running = workers.submit("a", work)
    waiting = workers.submit("b", lambda: 1)
    assert begun.wait(10)
    workers.close()
    assert waiting.cancelled()
    with pytest.raises(TokenizationError, match="closed"):
        workers.submit("c", lambda: 1)
    go.set()
    assert running.result(10) == 1
