"""SGLang's cache_aware against what its source says, by hand."""

from __future__ import annotations

import random
from array import array

import pytest

from kvatlas.route.outcome import End
from kvatlas.sim.chains import Chains
from kvatlas.sim.policies.cache_aware import CacheAware
from kvatlas.sim.policies.policy import Surroundings
from kvatlas.sim.request import Request
from tests.models.workloads import SMALL, arrival, tokens

_SIZE = 16


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def policy(engines: int = 3, clock: Clock | None = None, **parameters: float) -> CacheAware:
    surroundings = Surroundings(clock=clock or Clock(), random=random.Random(1), block_size_tokens=_SIZE, blocks=1_000)
    made = CacheAware(surroundings, **parameters)  # type: ignore[arg-type]
    for engine in range(engines):
        made.joins(engine, SMALL)
    return made


def request(*names: str, blocks: int = 10) -> Request:
    """A prompt of parts of so many blocks, and one token more."""
    asked = arrival(0.0, *(tokens(name, blocks * _SIZE) for name in names), tokens(names, 1))
    whole = asked.prompt_tokens // _SIZE
    return Request(0, asked, 0.0, keys(asked.tokens[: whole * _SIZE]), whole)


def keys(prompt: array[int]) -> array[int]:
    return Chains(_SIZE, "m").keys(prompt)


def send(made: CacheAware, asked: Request, *, stays: bool = False) -> int:
    asked.engine = made.choose(asked)
    if not stays:
        made.ended(asked, 0.0, End.DONE)
    return asked.engine


def loaded(made: CacheAware, *loads: int) -> None:
    made.loads.update(enumerate(loads))


def test_more_than_the_threshold_goes_to_who_had_it_first() -> None:
    made = policy()
    loaded(made, 2, 1, 3)
    assert send(made, request("a", "b")) == 1
    loaded(made, 0, 5, 5)
    assert send(made, request("a", "c")) == 1  # 10 of 20 blocks: 0.498 of the tokens
    assert send(made, request("a", "d", "e", "f")) == 0  # 10 of 40: 0.25


def test_the_threshold_itself_is_not_enough() -> None:
    asked = request("a", "b")
    share = 10 * _SIZE / asked.arrival.prompt_tokens
    for threshold, expected in ((share, 0), (share - 1e-6, 1)):
        made = policy(cache_threshold=threshold)
        loaded(made, 1, 0, 1)
        send(made, request("a", "c"))
        loaded(made, 0, 1, 1)
        assert send(made, asked) == expected


@pytest.mark.parametrize(
    ("loads", "uneven"),
    [
        ((65, 0, 0), True),  # 65 - 0 > 64, and 65 > 1.5 * 0
        ((64, 0, 0), False),
        ((195, 131, 130), False),  # 195 - 130 > 64, but 195 is 1.5 * 130
        ((196, 131, 130), True),
    ],
)
def test_uneven_loads_go_first(loads: tuple[int, ...], uneven: bool) -> None:
    made = policy()
    loaded(made, 0, 9, 9)
    send(made, request("a"))
    loaded(made, *loads)
    assert (send(made, request("a")) != 0) is uneven


def test_of_equal_loads_the_first_is_taken() -> None:
    """Why low loads all go to one engine."""
    made = policy()
    assert {send(made, request(f"own {number}")) for number in range(20)} == {0}


def test_a_prefix_that_several_have_goes_to_the_first_of_them() -> None:
    made = policy()
    loaded(made, 1, 0, 1)
    send(made, request("a", "b"))
    loaded(made, 90, 90, 0)
    assert send(made, request("a", "c"), stays=True) == 2  # uneven
    loaded(made, 0, 0, 0)
    assert send(made, request("a", "d")) == 1
    assert send(made, request("a", "c")) == 2  # the end of the match is that of 2


def test_who_leaves_is_forgotten() -> None:
    made = policy()
    loaded(made, 1, 0, 1)
    send(made, request("a"))
    made.leaves(1)
    assert send(made, request("a")) == 0
    assert list(made.blocks) == [0, 2]


def test_the_oldest_leaves_go_first() -> None:
    made = policy(engines=1)
    for name in "abc":
        send(made, request("system", name))
    assert made.blocks[0] == 40
    send(made, request("system", "a"))
    made.evict(30)  # without "b"
    assert made.blocks[0] == 30
    made._cache_threshold = 0.9
    assert [made._by_prefix(request("system", name).keys, 20 * _SIZE, -1) for name in "abc"] == [0, -1, 0]
    made.evict(0)
    assert made.blocks[0] == 0
    assert not list(made._tree.nodes())


def test_the_tree_is_cut_down_every_interval() -> None:
    clock = Clock()
    made = policy(engines=1, clock=clock, max_tree_size=4 * _SIZE * 15, eviction_interval_s=120.0)
    for number in range(3):
        send(made, request(f"{number}"))
    assert made.blocks[0] == 30
    clock.now_s = 120.0
    send(made, request("last"))
    assert made.blocks[0] == 20  # at most 15, and then 10 more
