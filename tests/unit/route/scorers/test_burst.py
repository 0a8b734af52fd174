"""Bursts: equal and similar prompts of one window meet at one endpoint, within bounds, and none of them waits."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.scorers import burst
from kvatlas.route.scorers.burst import BurstPrefixCacheProducer
from kvatlas.route.scorers.prefix import PrefixCacheScorer
from tests.models.scoring import candidate, cycle, decide, plugin

A, B, C = candidate("a"), candidate("b"), candidate("c")
NAME = "plugin"


def prompt(*blocks: int, cut: int = 0) -> array[int]:
    """A prompt of 64-token blocks, each of one token id; ``cut``: tokens of one more."""
    return array("I", [block for block in blocks for _ in range(64)] + [7] * cut)


class Burst:
    """Sends requests: where they are steered, else to whom the test says."""

    def __init__(self, *candidates: Candidate, **parameters: Any) -> None:
        self.producer = plugin(BurstPrefixCacheProducer, parameters)
        self.candidates = list(candidates or (A, B, C))

    def send(self, tokens: array[int] | None, otherwise: Candidate = A, now_s: float = 0.0, **request: Any) -> str | None:
        """Return where it was steered; None: nowhere."""
        asked = self.asked(tokens, now_s, **request)
        self.producer.produce(asked)
        steered = list(asked.matches[NAME].by_endpoint) if NAME in asked.matches else []
        by_name = {one.name: one for one in self.candidates}
        self.producer.decided(asked, decide(asked, by_name[steered[0]] if steered else otherwise))
        return steered[0] if steered else None

    def asked(self, tokens: array[int] | None, now_s: float = 0.0, **request: Any) -> Cycle:
        return cycle(self.candidates, token_ids=tokens, now_s=now_s, **request)


def test_equal_prompts_follow_the_first_one() -> None:
    burst = Burst()
    assert burst.send(prompt(1, 2), otherwise=B) is None
    assert [burst.send(prompt(1, 2)) for _ in range(3)] == ["b", "b", "b"]


def test_a_match_is_full_and_speculative_and_a_scorer_can_ask_for_it() -> None:
    burst = Burst()
    burst.send(prompt(1, 2, cut=3), otherwise=B)
    asked = burst.asked(prompt(1, 2, cut=3))
    burst.producer.produce(asked)
    (match,) = asked.matches[NAME].by_endpoint.values()
    assert (match.tokens, match.speculative_tokens, asked.matches[NAME].blocks) == (131, 131, 3)
    assert plugin(PrefixCacheScorer).score(asked, [A, B, C]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "request_"),
    [
        (prompt(1, 3), {}),
        (prompt(1), {}),
        (prompt(1, 2, cut=1), {}),
        (prompt(1, 2), {"cache_salt": "other"}),
        (prompt(1, 2), {"model": "other"}),
    ],
)
def test_other_prompts_do_not_follow(tokens: array[int], request_: dict[str, Any]) -> None:
    burst = Burst()
    burst.send(prompt(1, 2))
    assert burst.send(tokens, **request_) is None


def test_texts_do_where_tokens_are_not_known() -> None:
    burst = Burst()
    burst.send(None, otherwise=C, text="word " * 100)
    assert burst.send(None, text="word " * 100) == "c"
    assert burst.send(None, text="other " * 100) is None


def test_a_prompt_that_is_not_known_is_not_matched() -> None:
    burst = Burst()
    asked = burst.asked(None)
    burst.producer.produce(asked)
    assert asked.matches == {}


def test_they_follow_to_where_the_first_one_went_in_fact() -> None:
    burst = Burst()
    burst.send(prompt(1))
    asked = burst.asked(prompt(1))
    burst.producer.produce(asked)
    burst.producer.decided(asked, decide(asked, A, prefill=C))
    assert burst.producer._window._load == {"a": 1, "c": 1}


def test_a_window_ends_and_what_was_in_it_is_forgotten() -> None:
    burst = Burst(windowDurationMs=100)
    burst.send(prompt(1), otherwise=B, now_s=5.0)
    assert burst.send(prompt(1), now_s=5.09) == "b"
    assert burst.send(prompt(1), otherwise=C, now_s=5.1) is None
    assert burst.send(prompt(1), now_s=5.15) == "c"


def test_a_bound_per_replica_spills_to_the_least_loaded() -> None:
    burst = Burst(maxPerReplica=2)
    assert [burst.send(prompt(1)) for _ in range(8)] == [None, "a", "b", "b", "c", "c", "a", "b"]


def test_of_equally_loaded_ones_who_runs_less_is_next() -> None:
    busy, idle = candidate("b", running=5), candidate("c", running=1)
    burst = Burst(A, busy, idle, maxPerReplica=1)
    assert [burst.send(prompt(1)) for _ in range(3)] == [None, "c", "b"]


def test_an_endpoint_that_is_no_candidate_any_more_is_left() -> None:
    burst = Burst()
    burst.send(prompt(1), otherwise=A)
    burst.candidates = [B, C]
    assert burst.send(prompt(1)) == "b"


def test_a_common_prefix_is_shared_where_it_is_long_enough() -> None:
    burst = Burst(minColocateBlocks=2)
    burst.send(prompt(1, 2, 3), otherwise=B)
    assert burst.send(prompt(1, 9), otherwise=C) is None
    assert burst.send(prompt(1, 2, 4)) == "b"


def test_the_longest_common_prefix_is_preferred() -> None:
    burst = Burst(minColocateBlocks=1)
    burst.send(prompt(1, 2, 3), otherwise=B)
    burst.send(prompt(5), otherwise=C)
    burst.send(prompt(5), otherwise=C)
    assert burst.send(prompt(1, 2, 4)) == "b"


def test_a_common_prefix_does_not_fill_an_endpoint_beyond_its_fair_share() -> None:
    burst = Burst(minColocateBlocks=1)
    went = [burst.send(prompt(1, 100 + number)) or "a" for number in range(12)]
    assert Counter(went) == {"a": 4, "b": 4, "c": 4}


def test_without_a_minimum_only_equal_prompts_meet() -> None:
    burst = Burst()
    burst.send(prompt(1, 2, 3))
    assert burst.send(prompt(1, 2, 4)) is None


def test_load_in_tokens_counts_what_an_endpoint_was_not_sent_before() -> None:
    burst = Burst(balanceBy="tokens", minColocateBlocks=1)
    burst.send(prompt(1, 2, 3, 4), otherwise=A)
    assert burst.send(prompt(1, 2, 3, 5)) == "a"
    assert burst.send(prompt(1, 2, 3, 5)) == "a"
    assert burst.producer._window._load == {"a": 5}


def test_prompts_that_are_equal_up_to_the_longest_prefix_are_one() -> None:
    burst = Burst(maxPrefixTokensToMatch=128)
    burst.send(prompt(1, 2, 3), otherwise=C)
    assert burst.send(prompt(1, 2, 4)) == "c"


def test_a_full_window_steers_no_more_and_says_so() -> None:
    burst = Burst(maxBatchSize=2)
    assert [burst.send(prompt(1)) for _ in range(3)] == [None, "a", None]
    asked = burst.asked(prompt(1))
    burst.producer.produce(asked)
    assert asked.notes == ["plugin: the window has 2 requests, no more are steered"]


def test_a_window_of_any_number_is_bounded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burst, "WINDOW_BLOCKS_MAX", 4)
    sent = Burst(maxBatchSize=-1)
    assert [sent.send(prompt(1, 2)) for _ in range(3)] == [None, "a", "a"]  # equal blocks are counted once
    assert sent.send(prompt(3, 4)) is None
    assert sent.send(prompt(3, 4)) is None


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"maxPerReplica": 0}, "maxPerReplica"),
        ({"maxBatchSize": -2}, "maxBatchSize"),
        ({"maxPrefixTokensToMatch": 63}, "maxPrefix"),
    ],
)
def test_bounds_that_let_nothing_through_are_refused(parameters: dict[str, int], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        plugin(BurstPrefixCacheProducer, parameters)


@pytest.mark.parametrize(
    "parameters", [{"windowDurationMs": 0}, {"windowDurationMs": 10_001}, {"blockSizeTokens": 0}, {"balanceBy": "blocks"}]
)
def test_parameters_out_of_their_range_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        plugin(BurstPrefixCacheProducer, parameters)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.sampled_from(["requests", "tokens"]))
def test_no_endpoint_has_more_of_a_prompt_than_it_may_while_there_is_room(prompts: list[int], most: int, by: str) -> None:
    burst = Burst(maxPerReplica=most, balanceBy=by)
    went: dict[int, Counter[str]] = {}
    for number in prompts:
        counts = went.setdefault(number, Counter())
        steered = burst.send(prompt(number, number))
        assert (steered is None) == (not counts)
        counts[steered or "a"] += 1
        if sum(counts.values()) <= 3 * most:
            assert max(counts.values()) <= most
