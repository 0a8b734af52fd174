"""Workloads: the same seed gives the same requests, whoever is answered first; nothing is kept of what was sent."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from kvatlas.errors import ConfigError, RequestError
from kvatlas.sim.workloads.catalog import choose
from kvatlas.sim.workloads.draws import Draws
from kvatlas.sim.workloads.shared_prefix import SharedPrefixParameters, stages
from kvatlas.sim.workloads.workload import Arrival, Workload

SHORT: dict[str, dict[str, object]] = {
    "chats": {"duration_s": 30},
    "agents": {"duration_s": 30},
    "shared-prefix": {"stages": "5:10 20:10", "groups": 6, "warm_up": "3:10"},
    "bursts": {"duration_s": 60},
    "no-reuse": {"duration_s": 30},
}
made_up = pytest.mark.parametrize("name", SHORT)


def opened(name: str, seed: int = 1, scale: float = 1.0, limit: int | None = None, **parameters: object) -> Workload:
    return choose(name, {**SHORT.get(name, {}), **parameters}).open(seed=seed, scale=scale, requests_max=limit)


def played(workload: Workload, answer_s: float = 1.0) -> list[Arrival]:
    """Return all requests, each session's to its end before the next one's; each answered after ``answer_s``."""
    found = []
    for arrival in workload.arrivals():
        following: Arrival | None = arrival
        while following is not None:
            found.append(following)
            following = workload.after(following, following.at_s + answer_s)
    return found


def lengths(arrivals: list[Arrival]) -> list[tuple[float, int, int]]:
    return [(one.at_s, one.prompt_tokens, one.output_tokens) for one in arrivals]


@made_up
def test_a_seed_reproduces_all_requests(name: str) -> None:
    first, again = played(opened(name)), played(opened(name))
    assert first == again
    assert lengths(first) != lengths(played(opened(name, seed=2)))


@made_up
def test_requests_come_in_the_order_of_time_and_have_answers(name: str) -> None:
    arrivals = list(opened(name).arrivals())
    assert arrivals
    assert all(before.at_s <= after.at_s for before, after in itertools.pairwise(arrivals))
    assert all(one.tokens.typecode == "I" and 0 < one.prompt_tokens < len(one.tokens) for one in arrivals)


@made_up
def test_denser_arrivals_are_as_many_in_less_time(name: str) -> None:
    once, thrice = list(opened(name).arrivals()), list(opened(name, scale=3).arrivals())
    assert len(once) == len(thrice)
    phases = {one.phase for one in once}
    for phase in phases:  # gaps between phases stay as long as they are
        slow, fast = ([one.at_s for one in found if one.phase == phase] for found in (once, thrice))
        assert fast[-1] - fast[0] == pytest.approx((slow[-1] - slow[0]) / 3)


@made_up
def test_a_limit_counts_what_comes_and_what_users_go_on_with(name: str) -> None:
    assert len(played(opened(name, limit=7))) == 7
    assert len(played(opened(name, limit=10**9))) == len(played(opened(name)))


@made_up
def test_answers_are_no_part_of_anything_else(name: str) -> None:
    """Engines would have answers of one request in the prompt of another."""
    answers = Counter(one.tokens[-1] for one in played(opened(name)))
    assert max(answers.values()) == 1


@pytest.mark.parametrize("name", ["chats", "agents"])
def test_a_next_turn_begins_with_all_that_was_said(name: str) -> None:
    workload = opened(name)
    turns = 0
    for arrival in itertools.islice(workload.arrivals(), 50):
        following = workload.after(arrival, arrival.at_s + 2)
        if following is not None:
            turns += 1
            assert following.at_s >= arrival.at_s + 2
            assert following.session == arrival.session
            assert following.tokens[: len(arrival.tokens)] == arrival.tokens
            assert following.prompt_tokens > len(arrival.tokens)
    assert turns > 10


@pytest.mark.parametrize("name", ["chats", "agents"])
def test_what_a_user_says_does_not_depend_on_who_is_answered_first(name: str) -> None:
    def turns(order: int) -> list[tuple[float, int, int] | None]:
        workload = opened(name)
        arrivals = list(itertools.islice(workload.arrivals(), 2))
        following = [workload.after(arrival, 20.0) for arrival in arrivals[::order]][::order]
        return [None if turn is None else (turn.at_s, turn.prompt_tokens, len(turn.tokens)) for turn in following]

    assert turns(1) == turns(-1)


def test_chats_come_at_their_rate_and_have_so_many_turns() -> None:
    arrivals = played(opened("chats", qps=20, duration_s=1000, think_s=1.0))
    assert len(arrivals) / 1000 == pytest.approx(20, rel=0.1)
    turns = Counter(one.session for one in arrivals)
    assert sum(turns.values()) / len(turns) == pytest.approx(6, rel=0.1)


def test_no_chat_gets_longer_than_its_context() -> None:
    arrivals = played(opened("chats", qps=1000, turns=1000, context_tokens_max=5000, think_s=0))
    assert 4500 < max(len(one.tokens) for one in arrivals) <= 5000


def test_branches_of_a_task_begin_at_once_with_the_same_prefix() -> None:
    arrivals = list(opened("agents", branches=3).arrivals())
    for first, second, third in zip(arrivals[::3], arrivals[1::3], arrivals[2::3], strict=True):
        assert first.at_s == second.at_s == third.at_s
        assert first.tokens[:8001] == second.tokens[:8001] == third.tokens[:8001]
        assert len({first.session, second.session, third.session}) == 3


def test_a_burst_is_one_request_again_and_again_that_was_not_there_before() -> None:
    arrivals = list(opened("bursts", burst_requests=30).arrivals())
    prompts = Counter(one.tokens[: one.prompt_tokens].tobytes() for one in arrivals)
    bursts = [prompt for prompt, count in prompts.items() if count > 1]
    assert bursts
    assert all(prompts[prompt] == 30 for prompt in bursts)
    steady = {one.tokens[0] for one in arrivals if prompts[one.tokens[: one.prompt_tokens].tobytes()] == 1}
    assert steady.isdisjoint(memoryview(prompt).cast("I")[0] for prompt in bursts)


def test_popular_prefixes_are_zipf_distributed() -> None:
    arrivals = opened("bursts", duration_s=1000, prefixes=10, burst_every_s=1e9).arrivals()
    counts = sorted(Counter(one.tokens[0] for one in arrivals).values(), reverse=True)
    expected = [sum(counts) / rank / sum(1 / one for one in range(1, 11)) for rank in (1, 2)]
    assert counts[:2] == pytest.approx(expected, rel=0.1)


# -- llm-d's benchmark ----------------------------------------------------------------------------------------------------


def test_the_ladder_is_as_published() -> None:
    ladder = stages(SharedPrefixParameters())
    assert [(stage.rate_per_s, stage.duration_s) for stage in ladder][:4] == [(15, 50), (3, 20), (10, 20), (15, 20)]
    assert [stage.name for stage in ladder][:2] == ["warm-up", "3 QPS"]
    assert (len(ladder), ladder[-1].rate_per_s, sum(stage.requests for stage in ladder)) == (17, 60, 17084)
    arrivals = list(itertools.islice(choose("shared-prefix", {}).open(seed=0).arrivals(), 750))
    assert {(one.prompt_tokens, one.output_tokens, one.phase) for one in arrivals} == {(7200, 1000, "warm-up")}
    assert len({one.tokens[: one.prompt_tokens].tobytes() for one in arrivals}) == 750
    assert set(Counter(one.tokens[0] for one in arrivals).values()) == {5}


def test_each_stage_begins_with_the_same_prompts_after_a_gap() -> None:
    arrivals = list(opened("shared-prefix", gap_s=100).arrivals())
    by_phase = {name: [one for one in arrivals if one.phase == name] for name in ("warm-up", "5 QPS", "20 QPS")}
    first = [one.tokens[: one.prompt_tokens] for one in by_phase["warm-up"]]
    assert [one.tokens[: one.prompt_tokens] for one in by_phase["5 QPS"]][:30] == first
    assert [one.tokens[: one.prompt_tokens] for one in by_phase["20 QPS"]][:30] == first
    assert by_phase["5 QPS"][0].at_s >= by_phase["warm-up"][-1].at_s + 100


def test_one_rate_instead_of_the_ladder() -> None:
    ladder = stages(SharedPrefixParameters(qps=30, duration_s=10, warm_up=""))
    assert [(stage.name, stage.requests) for stage in ladder] == [("30 QPS", 300)]


@pytest.mark.parametrize("text", ["", "5", "5:", "x:1", "5:0", "-1:5", "5:20 5:10", "nan:1"])
def test_bad_stages_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="stages"):
        choose("shared-prefix", {"stages": text})


# -- parameters ---------------------------------------------------------------------------------------------------------


def test_an_unknown_parameter_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r'gropus.*did you mean "groups".*users'):
        choose("shared-prefix", {"gropus": 3})


@pytest.mark.parametrize("given", [{"groups": "x"}, {"groups": 0}, {"qps": 0}, {"groups": 1.5}, {"duration_s": -1}])
def test_bad_values_are_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        choose("shared-prefix", given)


def test_an_unknown_workload_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"nope.*chats.*mooncake"):
        choose("nope", {})
    with pytest.raises(ConfigError, match="file"):
        choose("mooncake", {})
    with pytest.raises(RequestError, match="cannot be read"):
        choose("mooncake", {"file": "nowhere.jsonl"})


# -- bounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("no-reuse", {"prompt_tokens": 20}),
        ("bursts", {"prefix_tokens": 20}),
        ("chats", {"system_tokens": 20, "user_tokens": 20}),
    ],
)
def test_memory_does_not_grow_with_the_number_of_requests(name: str, small: dict[str, object]) -> None:
    workload = opened(name, **{**small, "duration_s": 1e6, "qps": 1000})
    arrivals = workload.arrivals()
    for arrival in itertools.islice(arrivals, 1000):
        workload.after(arrival, arrival.at_s)
    tracemalloc.start()
    for arrival in itertools.islice(arrivals, 5_000):
        workload.after(arrival, arrival.at_s)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 50_000


# -- random numbers -----------------------------------------------------------------------------------------------------


def test_draws_are_distributed_as_they_say() -> None:
    draws = Draws(7)
    count = 20_000
    assert sum(draws.uniform() for _ in range(count)) / count == pytest.approx(0.5, abs=0.01)
    assert sum(draws.waiting(3.0) for _ in range(count)) / count == pytest.approx(3.0, rel=0.05)
    assert sum(draws.length(500, 0.6) for _ in range(count)) / count == pytest.approx(500, rel=0.05)
    assert sum(draws.count(6) for _ in range(count)) / count == pytest.approx(6, rel=0.05)
    assert {draws.below(3) for _ in range(100)} == {0, 1, 2}
    assert {draws.length(9, 0) for _ in range(10)} == {9}
    assert {draws.count(1) for _ in range(10)} == {1}


def test_places_have_draws_of_their_own() -> None:
    seen = {Draws(seed, session, turn).uniform() for seed in range(10) for session in range(10) for turn in range(10)}
    assert len(seen) == 1000
    assert Draws(1, 2).uniform() == Draws(1, 2).uniform()
    spread = math.fsum(Draws(0, place).uniform() for place in range(10_000)) / 10_000
    assert spread == pytest.approx(0.5, abs=0.02)
