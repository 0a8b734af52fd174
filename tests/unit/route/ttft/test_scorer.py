"""Expectations as scores: who gets the request, how near-ties are spread, what is learnt from which outcomes, trials."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport, InFlight, Load, attention_pairs
from kvatlas.route.matches import MatchSource, PrefixMatch, PrefixMatches
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.pickers import MaxScorePicker, PickerParameters
from kvatlas.route.plugins import Services, plugin_types
from kvatlas.route.profile import Profile, WeightedScorer
from kvatlas.route.request import RouteRequest
from kvatlas.route.ttft.learning import Sample
from kvatlas.route.ttft.model import Costs
from kvatlas.route.ttft.scorer import LOAD_SPREAD, TRIAL_EVERY, ExpectedTtft
from kvatlas.types import PodId

PROMPT_TOKENS = 4_000
IDLE = (0, 0)


def services() -> Services:
    def nothing(name: str) -> object:
        raise AssertionError(name)

    return Services(plugin=nothing, clock=lambda: 0.0, random=random.Random(1))


def scorer() -> ExpectedTtft:
    return ExpectedTtft("ttft", ExpectedTtft.Parameters(), services())


def cycle(
    queues: Sequence[tuple[int, int]], held: Mapping[int, int] | None = None, prompt_tokens: int = PROMPT_TOKENS
) -> Cycle:
    """``queues``: by candidate, requests and tokens in its queue; ``held``: cached tokens by candidate."""
    candidates = tuple(
        Candidate(
            Endpoint(name=EndpointName(f"e{at}"), address="10.0.0.1", port=8000, pod=PodId(f"e{at}")),
            Load(None, InFlight(requests, tokens, requests, tokens)),
        )
        for at, (requests, tokens) in enumerate(queues)
    )
    made = Cycle(RouteRequest(id="r", model="m", prompt_tokens_estimated=prompt_tokens), candidates, 0.0, random.Random(1))
    found = {EndpointName(f"e{at}"): PrefixMatch(tokens, MatchSource.HISTORY) for at, tokens in (held or {}).items()}
    made.matches["prefix"] = PrefixMatches(found, 16, prompt_tokens // 16)
    return made


def decide(plugin: ExpectedTtft, on: Cycle) -> Decision:
    picker = MaxScorePicker("max", PickerParameters(), services())
    run = Profile("default", (), (WeightedScorer("ttft", plugin),), picker).run(on, on.candidates)
    assert run is not None
    target = run.picked[0].endpoint
    decision = Decision(request=on.request, at_s=0.0, targets=(target,), runs={"default": run}, matches=on.matches)
    plugin.decided(on, decision)
    return decision


def test_it_is_found_under_both_names() -> None:
    types = plugin_types()
    assert types["expected-ttft"].load() is types["expected-ttft-scorer"].load() is ExpectedTtft


def test_the_holder_gets_the_request_while_its_queue_is_shorter_than_the_prompt() -> None:
    short = cycle([(1, 1_000), IDLE], {0: 3_900})
    long = cycle([(8, 9_000), IDLE], {0: 3_900})
    assert decide(scorer(), short).target.name == "e0"
    assert decide(scorer(), long).target.name == "e1"


def test_a_score_is_the_share_of_the_best_price() -> None:
    on = cycle([IDLE, (1, 4_000)])
    scores = scorer().score(on, on.candidates)
    assert scores[0] == 1
    assert scores[1] == pytest.approx(0.99 * scores.expected(0).price_s / scores.expected(1).price_s, rel=0.06)
    assert 0.45 < scores[1] < 0.6


def test_equal_candidates_get_equal_scores() -> None:
    on = cycle([IDLE] * 5)
    assert scorer().score(on, on.candidates) == [1.0] * 5


def test_near_ties_go_to_whom_has_less_in_flight() -> None:
    on = cycle([(1, 260), (1, 250), (1, 255)], prompt_tokens=20_000)
    scores = scorer().score(on, on.candidates)
    assert scores[1] > scores[2] > scores[0] > 1 - LOAD_SPREAD


def test_nearly_equal_ones_are_ordered_by_what_they_have_to_compute_first() -> None:
    """A copy of a prefix that takes as long as waiting for its holder costs the fleet more."""
    on = cycle([(1, 4_100), IDLE], {0: 3_900})
    scores = scorer().score(on, on.candidates)
    assert scores.expected(0).price_s > scores.expected(1).price_s
    assert scores[0] == 1 > scores[1]


def test_no_candidate_is_chosen_for_its_place_in_the_list() -> None:
    plugin = scorer()
    rng = random.Random(3)
    picked = []
    for _ in range(400):
        on = cycle([IDLE] * 4)
        on.random = rng
        picked.append(decide(plugin, on).target.name)
    assert all(picked.count(EndpointName(f"e{at}")) > 60 for at in range(4))


queues = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 200_000)), min_size=1, max_size=12)


@given(queues, st.dictionaries(st.integers(0, 11), st.integers(0, 5_000)), st.integers(0, 5_000))
def test_scores_are_between_0_and_1_and_in_the_order_of_prices(
    loads: list[tuple[int, int]], held: dict[int, int], prompt_tokens: int
) -> None:
    on = cycle(loads, held, prompt_tokens)
    scores = scorer().score(on, on.candidates)
    prices = [scores.expected(at).price_s for at in range(len(loads))]
    assert all(0 < score <= 1 for score in scores)
    assert max(scores) == 1
    for at, score in enumerate(scores):
        for other, another in enumerate(scores):
            if prices[at] > prices[other] * 1.11:
                assert score < another


def test_a_score_is_explained() -> None:
    on = cycle([(2, 5_000), IDLE], {0: 3_000})
    explained = decide(scorer(), on).runs["default"].ratings[0].explained  # type: ignore[union-attr]
    assert explained is not None
    parts = explained.parts(0)
    assert parts["queue_s"] == pytest.approx(2 * 0.02 + 0.5)
    assert parts["prefill_s"] == pytest.approx(0.02 + 0.1 + Costs().pair_s * attention_pairs(1_000, 4_000))
    assert parts["ttft_s"] == pytest.approx(0.66 + Costs().pair_s * attention_pairs(1_000, 4_000))
    assert parts["tokens_per_s"] == pytest.approx(10_000)
    assert (parts["samples"], parts["explored"]) == (0, "no")


# -- learning from outcomes ---------------------------------------------------------------------------------------------

DONE = Outcome(end=End.DONE, ttft_s=2.0, duration_s=5.0, prompt_tokens=PROMPT_TOKENS, cached_tokens=0, output_tokens=100)
NO_SAMPLES = {
    "the client left before": Outcome(end=End.CLIENT_GONE, duration_s=0.1),
    "the engine was not there": Outcome(end=End.UNREACHABLE),
    "the request was refused": Outcome(end=End.REFUSED, ttft_s=0.001, duration_s=0.001),
    "the answer came as a whole": Outcome(end=End.DONE, ttft_s=9.0, duration_s=9.0, output_tokens=300),
}


def test_a_first_token_is_learnt_from() -> None:
    plugin = scorer()
    decision = decide(plugin, cycle([IDLE]))
    plugin.finished(decision, decision.target.name, DONE)
    assert plugin.learner.traits("e0").samples == 1


@pytest.mark.parametrize("case", NO_SAMPLES)
def test_what_says_nothing_about_prefill_is_no_sample(case: str) -> None:
    plugin = scorer()
    decision = decide(plugin, cycle([IDLE]))
    plugin.finished(decision, decision.target.name, NO_SAMPLES[case])
    assert plugin.learner.traits("e0").samples == 0


def test_a_client_that_left_after_the_first_token_is_a_sample() -> None:
    plugin = scorer()
    decision = decide(plugin, cycle([IDLE]))
    plugin.finished(decision, decision.target.name, Outcome(end=End.CLIENT_GONE, ttft_s=0.5, duration_s=0.5))
    assert plugin.learner.traits("e0").samples == 1


def test_a_retry_elsewhere_teaches_nothing() -> None:
    plugin = scorer()
    decision = decide(plugin, cycle([IDLE, (9, 90_000)]))
    plugin.finished(decision, EndpointName("e1"), DONE)
    assert plugin.learner.traits("e0").samples == plugin.learner.traits("e1").samples == 0


def test_an_endpoint_that_left_the_pool_is_not_learnt_again() -> None:
    plugin = scorer()
    decision = decide(plugin, cycle([IDLE]))
    plugin.pool_changed(())
    plugin.finished(decision, decision.target.name, DONE)
    assert not plugin.learner.knows("e0")


# -- trials -------------------------------------------------------------------------------------------------------------


def test_an_engine_that_looks_slow_gets_one_decision_in_so_many() -> None:
    plugin = scorer()
    rng = random.Random(1)
    for _ in range(30):
        for name, slowness in (("e0", 1), ("e1", 1), ("e2", 10)):
            plugin.learner.ttft(name, Sample(slowness * rng.uniform(0.4, 0.45), 0.0, 1, 4_000, 8_000_000))
    picked = [decide(plugin, cycle([(1, 1_000), (1, 1_100), IDLE])).target.name for _ in range(20 * TRIAL_EVERY)]
    assert picked.count(EndpointName("e2")) in {19, 20}


def test_nobody_is_tried_while_it_has_a_prompt_to_compute() -> None:
    plugin = scorer()
    for _ in range(30):
        for name, ttft_s in (("e0", 0.4), ("e1", 0.4), ("e2", 4.0)):
            plugin.learner.ttft(name, Sample(ttft_s, 0.0, 1, 4_000, 8_000_000))
    picked = [decide(plugin, cycle([(3, 9_000), (3, 9_000), (1, 100)])).target.name for _ in range(5 * TRIAL_EVERY)]
    assert EndpointName("e2") not in picked


def test_a_preview_teaches_nothing_and_a_decision_teaches_what_engines_said() -> None:
    plugin = scorer()
    for at_s in range(10):
        on = cycle([IDLE, IDLE])
        report = EngineReport(at_s=float(at_s), waiting=3, running=5)
        on.candidates = tuple([Candidate(one.endpoint, Load(report, one.load.in_flight)) for one in on.candidates])
        plugin.score(on, on.candidates)
        assert at_s > 7 or plugin.learner.traits("e0").slots is None
        if at_s >= 5:
            decide(plugin, on)
    assert plugin.learner.traits("e0").slots == 5
