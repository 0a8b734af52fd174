"""The expected time to first token: its parts, with worked numbers, and what must hold of them whatever the figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.load import EngineReport, InFlight, Load
from kvatlas.route.matches import NO_MATCH, MatchSource, PrefixMatch
from kvatlas.route.ttft.model import ANSWER_WEIGHT, FOLLOWER_WEIGHT, Costs, Traits, expect
from kvatlas.types import CPU, DISK, GPU

COSTS = Costs(request_s=0.02, token_s=1e-4, pair_s=0.0, decode_s=2.0, uncached_tokens=1_000)
IDLE = Load()


def held(tokens: int, source: MatchSource = MatchSource.EVENTS) -> PrefixMatch:
    return PrefixMatch(tokens, source)


def queued(requests: int, tokens: int) -> Load:
    return Load(None, InFlight(requests, tokens, requests, tokens))


def test_an_idle_engine_takes_the_time_of_the_uncached_tokens() -> None:
    expected = expect(COSTS, Traits(), IDLE, held(3_000), 4_000)
    assert expected.prefill_s == pytest.approx(0.02 + 0.1)
    assert expected.total_s == expected.prefill_s == expected.price_s


def test_each_token_attends_to_all_before_it() -> None:
    costs = Costs(request_s=0.02, token_s=1e-4, pair_s=1e-8)
    assert expect(costs, Traits(), IDLE, NO_MATCH, 20_000).prefill_s == pytest.approx(0.02 + 2.0 + 2.0)
    assert expect(costs, Traits(), IDLE, held(10_000), 20_000).prefill_s == pytest.approx(0.02 + 1.0 + 1.5)
    ahead = Load(
        None, InFlight(1, 20_000, 1, 10_000, 150_000_000, first_tokens=10_000, first_pairs=150_000_000, first_since_s=5.0)
    )
    assert expect(costs, Traits(), ahead, NO_MATCH, 100, now_s=5.0).queue_s == pytest.approx(0.02 + 1.0 + 1.5)
    assert expect(costs, Traits(), ahead, NO_MATCH, 100, now_s=6.0).queue_s == pytest.approx(0.02 + 1.5)


def test_prompts_that_were_sent_before_are_waited_for() -> None:
    assert expect(COSTS, Traits(), queued(2, 5_000), NO_MATCH, 1_000).queue_s == pytest.approx(2 * 0.02 + 0.5)


def test_a_slow_engine_takes_longer_for_all_of_it() -> None:
    expected = expect(COSTS, Traits(slowness=3.0), queued(2, 5_000), NO_MATCH, 1_000)
    assert expected.total_s == pytest.approx(3 * (0.54 + 0.12))


def test_history_is_believed_as_far_as_it_proved_right() -> None:
    traits = Traits(trust={MatchSource.EVENTS: 1.0, MatchSource.HISTORY: 0.25})
    assert expect(COSTS, traits, IDLE, held(4_000, MatchSource.HISTORY), 4_000).uncached_tokens == 3_000
    assert expect(COSTS, traits, IDLE, held(4_000), 4_000).uncached_tokens == 1, "the last token is always computed"


def test_requests_that_wait_beyond_ours_are_somebody_elses_and_count_as_average_ones() -> None:
    report = EngineReport(at_s=0.0, waiting=5)
    expected = expect(COSTS, Traits(), Load(report, InFlight(2, 800, 2, 800)), NO_MATCH, 1_000)
    assert expected.requests_ahead == 5
    assert expected.tokens_ahead == 800 + 3 * 1_000


def test_reports_are_compared_with_what_was_in_flight_when_they_came() -> None:
    report = EngineReport(at_s=0.0, waiting=5)
    ended_since, sent_since = Load(report, InFlight(2, 800, 2, 800), 5), Load(report, InFlight(7, 800, 7, 800), 4)
    assert expect(COSTS, Traits(), ended_since, NO_MATCH, 1_000).requests_ahead == 2
    assert expect(COSTS, Traits(), sent_since, NO_MATCH, 1_000).requests_ahead == 8


def test_of_the_prompt_that_is_computed_only_the_rest_is_waited_for() -> None:
    load = Load(None, InFlight(2, 5_000, 2, 5_000, first_tokens=3_800, first_since_s=10.0))  # the first takes .4 s
    left_s = [expect(COSTS, Traits(), load, NO_MATCH, 1_000, now_s=now_s).queue_s for now_s in (10.0, 10.1, 10.4)]
    assert left_s == pytest.approx([0.54, 0.44, 0.14])


def test_a_prompt_that_is_overdue_is_waited_for_as_long_again() -> None:
    load = Load(None, InFlight(1, 3_800, 1, 3_800, first_tokens=3_800, first_since_s=10.0))
    assert expect(COSTS, Traits(), load, NO_MATCH, 1_000, now_s=15.4).queue_s == pytest.approx(5.0)


def test_without_a_free_slot_the_wait_is_until_enough_requests_end() -> None:
    busy = Load(None, InFlight(10, 10_000, 0, 0))
    assert expect(COSTS, Traits(slots=8), busy, NO_MATCH, 100).decode_wait_s == pytest.approx(3 * 2.0 / 8)
    assert expect(COSTS, Traits(slots=11), busy, NO_MATCH, 100).decode_wait_s == 0
    assert expect(COSTS, Traits(), busy, NO_MATCH, 100).decode_wait_s == 0


def test_a_prompt_that_does_not_fit_into_free_kv_blocks_waits_for_others_to_end() -> None:
    report = EngineReport(at_s=0.0, running=10, kv_usage=0.95, gpu_blocks=1_000, block_size_tokens=16)
    assert expect(COSTS, Traits(), Load(report), NO_MATCH, 800).decode_wait_s == pytest.approx(0)
    assert expect(COSTS, Traits(), Load(report), NO_MATCH, 8_400).decode_wait_s == pytest.approx(7_600 * 2.0 / 15_200)


def test_full_kv_memory_of_unknown_size_costs_a_request_s_end() -> None:
    report = EngineReport(at_s=0.0, running=10, kv_usage=0.95)
    assert expect(COSTS, Traits(), Load(report), NO_MATCH, 800).decode_wait_s == pytest.approx(2.0 / 10)


def test_tokens_in_slower_tiers_are_loaded_and_those_in_gpu_memory_are_not() -> None:
    match = PrefixMatch(3_000, MatchSource.EVENTS, {GPU: 1_000, CPU: 1_000, DISK: 1_000})
    assert expect(COSTS, Traits(), IDLE, match, 4_000).tier_load_s == pytest.approx(8e-3 + 5e-2)


def test_work_ahead_of_others_has_a_price_where_requests_arrive_often() -> None:
    expected = expect(COSTS, Traits(), queued(1, 4_800), NO_MATCH, 4_800, behind_per_s=20.0)
    assert expected.others_delayed_s == pytest.approx(0.5 * 20 * (0.5 + 0.25))
    assert expected.total_s == pytest.approx(1.0)


loads = st.builds(queued, st.integers(0, 200), st.integers(0, 10**6))
costs = st.builds(Costs, request_s=st.floats(1e-4, 1), token_s=st.floats(1e-7, 1e-2))
rates = st.floats(0, 1e4)
sizes = st.integers(1, 10**6)


@given(costs, loads, sizes, rates, st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_cached_tokens_never_cost_more(costs: Costs, load: Load, prompt: int, per_s: float, some: int, more: int) -> None:
    little, much = (expect(costs, Traits(), load, held(tokens), prompt, per_s) for tokens in sorted((some, more)))
    assert much.price_s <= little.price_s


@given(costs, loads, sizes, rates, st.integers(0, 100), st.integers(0, 10**6), st.floats(1, 100))
def test_a_longer_queue_or_a_slower_engine_never_costs_less(
    costs: Costs, load: Load, prompt: int, per_s: float, requests: int, tokens: int, slowness: float
) -> None:
    flight = load.in_flight
    longer = queued(flight.prefill_requests + requests, flight.prefill_tokens + tokens)
    price_s = expect(costs, Traits(), load, NO_MATCH, prompt, per_s).price_s
    assert price_s <= expect(costs, Traits(), longer, NO_MATCH, prompt, per_s).price_s
    assert price_s <= expect(costs, Traits(slowness=slowness), load, NO_MATCH, prompt, per_s).price_s


def test_answers_in_progress_stand_still_for_a_prompt_and_are_slower_beside_its_answer() -> None:
    costs = Costs(request_s=0.02, token_s=1e-4, crowd_s=0.1)
    expected = expect(costs, Traits(), IDLE, held(3_000), 4_000, crowd=10.0)
    assert expected.answers_delayed_s == pytest.approx(ANSWER_WEIGHT * 10 * (expected.prefill_s + 0.1))
    assert expected.price_s == pytest.approx(expected.total_s + expected.answers_delayed_s)
    assert expect(costs, Traits(slowness=2.0), IDLE, held(3_000), 4_000, crowd=10.0).answers_delayed_s == pytest.approx(
        2 * expected.answers_delayed_s
    )


def test_a_new_prefix_delays_as_many_more_answers_as_will_come_for_it() -> None:
    costs = Costs(request_s=0.02, token_s=1e-4, crowd_s=0.1, followers=3.0)
    new, half = (expect(costs, Traits(), IDLE, held(tokens), 4_000, crowd=10.0) for tokens in (0, 2_000))
    assert new.answers_delayed_s == pytest.approx(ANSWER_WEIGHT * 10 * (new.prefill_s + 0.1) * (1 + FOLLOWER_WEIGHT * 3))
    assert half.answers_delayed_s == pytest.approx(ANSWER_WEIGHT * 10 * (half.prefill_s + 0.1) * (1 + FOLLOWER_WEIGHT * 1.5))
