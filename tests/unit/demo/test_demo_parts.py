"""What the demo counts, compares with and sends."""

from __future__ import annotations

import gzip
from importlib.resources import files
from itertools import islice
from pathlib import Path

from kvatlas.demo.tally import Tally
from kvatlas.demo.trace import PACKAGED, sessions
from kvatlas.demo.turns import InTurns
from kvatlas.demo.users import Sent
from kvatlas.sim.live.tokens import packaged_tokenizer

DATA = Path(__file__).parents[2] / "data"


def tally(engines: int = 2) -> Tally:
    in_turns = InTurns(4, 100)
    for number in range(engines):
        in_turns.join(f"engine-{number}")
    return Tally(in_turns)


def sent(
    cached: int = 0, predicted: int | None = 0, *, tokens: int = 20, engine: str = "engine-0", ttft_s: float = 0.1
) -> Sent:
    return Sent(
        at_s=0, engine=engine, prompt=tuple(range(tokens)), cached_tokens=cached, predicted_tokens=predicted, ttft_s=ttft_s
    )


def test_in_turns_every_engine_has_to_see_a_prompt_once() -> None:
    fleet = InTurns(4, 100)
    for name in "abc":
        fleet.join(name)
    assert [fleet.send(range(17)) for _ in range(6)] == [0, 0, 0, 16, 16, 16]


def test_the_last_token_is_never_cached() -> None:
    fleet = InTurns(4, 100)
    fleet.join("a")
    assert [fleet.send(range(16)), fleet.send(range(16)), fleet.send(range(3))] == [0, 12, 0]


def test_a_cache_that_is_full_forgets_what_was_used_least_recently() -> None:
    fleet = InTurns(4, 4)
    fleet.join("a")
    one, two = list(range(17)), list(range(100, 117))
    assert [fleet.send(one), fleet.send(one), fleet.send(two), fleet.send(one)] == [0, 16, 0, 0]


def test_who_leaves_takes_its_cache_along() -> None:
    fleet = InTurns(4, 100)
    fleet.join("a")
    fleet.send(range(17))
    fleet.join("b")
    fleet.leave("a")
    assert fleet.send(range(17)) == 0


def test_a_run_holds_where_nothing_failed_and_predictions_were_exact() -> None:
    counted = tally()
    assert not counted.holds
    for _ in range(9):
        counted.add(sent(cached=16, predicted=16))
    counted.add(sent(cached=16, predicted=0))
    assert counted.exact == 9
    assert counted.holds
    counted.add(sent(cached=0, predicted=16))
    assert not counted.holds


def test_one_failed_request_is_enough() -> None:
    counted = tally()
    counted.add(sent())
    assert counted.holds
    counted.add(Sent(at_s=0, problem="503"))
    assert not counted.holds
    assert len(counted.failed) == 1


def test_requests_that_the_router_moved_are_not_compared() -> None:
    counted = tally()
    counted.add(sent())
    counted.add(sent(cached=16, predicted=None))
    assert (counted.exact, len(counted.compared)) == (1, 1)


def test_times_are_told_apart_by_what_was_cached() -> None:
    counted = tally()
    for cached, ttft_s in ((16, 0.1), (0, 0.9), (0, 0.7), (0, 0.8), (8, 5.0)):
        counted.add(sent(cached=cached, ttft_s=ttft_s))
    assert counted.ttft_s(cached=True) == 0.1
    assert counted.ttft_s(cached=False) == 0.8
    assert tally().ttft_s(cached=True) is None


def test_each_engine_has_its_own_sums() -> None:
    counted = tally()
    counted.add(sent(cached=16))
    counted.add(sent(cached=8, engine="engine-1", ttft_s=0.3))
    one = counted.engine("engine-1")
    assert (one.requests, one.hit_ratio, one.ttft_s) == (1, 0.4, 0.3)
    assert counted.engine("nobody").requests == 0


def test_sessions_are_the_same_for_the_same_seed_and_go_on_without_end() -> None:
    one, two = (list(islice(sessions(7), 60)) for _ in range(2))
    assert one == two
    assert list(islice(sessions(8), 24)) != one[:24]
    assert {session[0].messages[0]["content"] for session in one} == {f"I am customer {number}." for number in range(3)}


def test_chats_are_the_traces_texts_in_turns() -> None:
    for session in islice(sessions(1), 24):
        for chat in session:
            assert [message["role"] for message in chat.messages[:3]] == ["user", "assistant", "user"][: len(chat.messages)]
            assert 8 <= chat.output_tokens <= 48


def test_the_packaged_trace_is_that_of_the_tests() -> None:
    packaged = (files("kvatlas.demo") / PACKAGED).read_bytes()
    assert gzip.decompress(packaged) == (DATA / "traces" / "lmcache_taubench.jsonl").read_bytes()


def test_the_packaged_tokenizer_is_that_of_the_tests_model() -> None:
    with packaged_tokenizer() as folder:
        for name in ("tokenizer.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (DATA / "tinymodel" / name).read_bytes()
    assert not folder.exists()
