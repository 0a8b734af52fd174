"""How long events take, seen by looking now and then; and how long promises last therefore."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.prefix.lag import LAGS_MIN, WATCHED_MAX, EventLag
from kvatlas.types import BlockKey, PodId, Stream

STREAM = Stream(PodId("a"))
KEY = BlockKey(1)


class Index:
    """Holds blocks from a given time on."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.comes_s: dict[BlockKey, float] = {}
        self.looks = 0

    def holds(self, stream: Stream, key: BlockKey) -> bool:
        self.looks += 1
        return self.comes_s.get(key, float("inf")) <= self.now_s


def learnt(lags_s: list[float], look_every_s: float, ttl_min_s: float = 2.0, ttl_max_s: float = 30.0) -> EventLag:
    """Return what was learnt of blocks that came after ``lags_s``, one after the other."""
    index = Index()
    lag = EventLag(ttl_min_s, ttl_max_s, index.holds)
    for number, lag_s in enumerate(lags_s):
        key = BlockKey(number)
        index.comes_s[key] = index.now_s + lag_s
        lag.watch(STREAM, key, index.now_s)
        for _ in range(int(lag_s / look_every_s) + 2):
            index.now_s += look_every_s
            lag.look(index.now_s)
    return lag


def test_promises_last_twice_as_long_as_events_take_mostly() -> None:
    assert 4.0 <= learnt([2.0] * 20, 0.1).ttl_s <= 4.4
    assert 4.0 <= learnt([2.0] * 60 + [20.0], 0.1).ttl_s <= 4.4  # one that took long changes nothing
    assert learnt([2.0] * 40 + [9.0] * 6, 0.1).ttl_s >= 18.0  # several do


def test_bounds_hold() -> None:
    assert learnt([0.1] * 20, 0.05).ttl_s == 2.0
    assert learnt([25.0] * 20, 1.0).ttl_s == 30.0


def test_few_observations_are_none() -> None:
    assert learnt([5.0] * (LAGS_MIN - 1), 0.1).ttl_s == 2.0
    assert learnt([5.0] * LAGS_MIN, 0.1).ttl_s > 2.0


def test_who_looks_too_rarely_learns_nothing() -> None:
    assert learnt([0.5] * 50, 3.0).ttl_s == 2.0


@given(st.lists(st.floats(0.01, 20.0), min_size=1, max_size=70), st.sampled_from([0.05, 0.2, 1.0]))
def test_a_promise_never_lasts_longer_than_twice_what_was_seen_or_the_bounds(lags_s: list[float], look_every_s: float) -> None:
    lag = learnt(lags_s, look_every_s)
    assert 2.0 <= lag.ttl_s <= 30.0
    assert lag.ttl_s <= max(2.0, 2 * 2 * max(lags_s) + 0.5)  # a lag is known to within half of itself, or a quarter of a second


def test_blocks_that_never_come_are_given_up_and_counted() -> None:
    index = Index()
    lag = EventLag(2.0, 30.0, index.holds)
    lag.watch(STREAM, KEY, 0.0)
    lag.look(30.0)
    assert lag.never_came == 0
    lag.look(30.1)
    lag.look(40.0)
    assert (lag.never_came, index.looks, lag.ttl_s) == (1, 2, 2.0)


def test_few_blocks_are_watched_and_one_is_looked_at_a_time() -> None:
    index = Index()
    lag = EventLag(2.0, 30.0, index.holds)
    for number in range(10):
        lag.watch(STREAM, BlockKey(number), 0.0)
    for _ in range(3):
        lag.look(1.0)
    assert index.looks == 3
    for _ in range(9):
        lag.look(50.0)
    assert lag.never_came == WATCHED_MAX


def test_streams_that_are_gone_are_waited_for_no_longer() -> None:
    index = Index()
    lag = EventLag(2.0, 30.0, index.holds)
    lag.watch(STREAM, KEY, 0.0)
    lag.keep({Stream(PodId("b"))})
    lag.look(1.0)
    assert index.looks == 0
