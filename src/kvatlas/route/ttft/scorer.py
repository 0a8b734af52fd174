"""The scorer ``expected-ttft``: who would answer first."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import attention_pairs
from kvatlas.route.matches import NO_MATCH, PrefixMatch
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.plugins import ExplainedScores, Services
from kvatlas.route.ttft.crowd import crowds
from kvatlas.route.ttft.learning import Learner, Sample
from kvatlas.route.ttft.model import Costs, Expected, Traits, expect

BAND_MIN, BAND_MAX = 0.02, 0.10
"""Times that differ by less, relatively, count as equal: half of the mean error of expectations, within these bounds."""
TRIAL_EVERY = 64
"""At most one in so many decisions tries an endpoint that looks slow as if it were like the others."""
LOOKS_SLOW = 1.25
"""Slowness over the fleet's from which on an endpoint needs trials to be seen again."""
LOAD_SPREAD = 0.01
"""How far scores inside the band lie apart, by load."""


class Chosen(NamedTuple):
    """Who computes a request's prompt, and what was expected of it."""

    endpoint: EndpointName
    expected: Expected
    match: PrefixMatch
    answering: int
    """Requests that were being answered there."""


class Forecast(ExplainedScores):
    """Scores of one decision, and what they were made from: shared values, written out only where somebody looks."""

    def __init__(
        self,
        scores: Sequence[float],
        costs: Costs,
        traits: Sequence[Traits],
        prompt_tokens: int,
        candidates: Sequence[Candidate],
        matches: Sequence[PrefixMatch],
        behind_per_s: Sequence[float],
        crowds: Sequence[float],
        now_s: float,
        tried: EndpointName | None,
    ) -> None:
        super().__init__(scores)
        self.tried = tried
        self.chosen: Chosen | None = None
        """None: somebody whom another profile rated, or nobody yet."""
        self._costs = costs
        self._traits = traits
        self._prompt_tokens = prompt_tokens
        self._candidates = candidates
        self._matches = matches
        self._behind_per_s = array("d", behind_per_s)
        self._crowds = array("d", crowds)
        self._now_s = now_s

    def expected(self, at: int) -> Expected:
        load, per_s, crowd = self._candidates[at].load, self._behind_per_s[at], self._crowds[at]
        return expect(self._costs, self._traits[at], load, self._matches[at], self._prompt_tokens, per_s, crowd, self._now_s)

    def choose(self, endpoint: EndpointName, expected: Sequence[Expected]) -> None:
        """Note who was chosen, if it is one of those that were rated. ``expected``: of all of them."""
        for at, candidate in enumerate(self._candidates):
            if candidate.endpoint.name == endpoint:
                self.chosen = Chosen(endpoint, expected[at], self._matches[at], candidate.load.in_flight.answering)

    def parts(self, at: int) -> Mapping[str, float | str]:
        expected, traits, match = self.expected(at), self._traits[at], self._matches[at]
        explored = self._candidates[at].name == self.tried
        return {
            "ttft_s": expected.total_s,
            "queue_s": expected.queue_s,
            "prefill_s": expected.prefill_s,
            "decode_wait_s": expected.decode_wait_s,
            "tier_load_s": expected.tier_load_s,
            "others_delayed_s": expected.others_delayed_s,
            "answers_delayed_s": expected.answers_delayed_s,
            "crowd": self._crowds[at],
            "tokens_ahead": expected.tokens_ahead,
            "uncached_tokens": expected.uncached_tokens,
            "tokens_per_s": 1 / (self._costs.token_s * traits.slowness),
            "slowness": traits.slowness,
            "cached_trust": traits.trust[match.source],
            "samples": traits.samples,
            "explored": "yes" if explored else "no",
        }


class ExpectedTtft:
    """Rates candidates by the time to first token that is to be expected of them; learns from every answer.

    The best one gets 1, one of twice the price .5. Nearly equal ones differ by at most ``LOAD_SPREAD``: first by what they
    would have to compute, then by what is in flight there.
    """

    class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
        prefix_match_info_producer_name: str | None = None
        """Whose matches count; None: those of the first producer that found any."""

    def __init__(self, name: str, parameters: Parameters, services: Services) -> None:
        self.name = name
        self.learner = Learner()
        self._producer = parameters.prefix_match_info_producer_name
        self._decisions = 0
        self._tried_at = 0
        self._picked_at: dict[EndpointName, int] = {}
        self._in_flight: Counter[EndpointName] = Counter()

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Forecast:
        learner, costs, prompt_tokens = self.learner, self.learner.costs, cycle.request.prompt_tokens
        found = cycle.matches_of(self._producer)
        tried = self._trial(candidates)
        names = [candidate.endpoint.name for candidate in candidates]
        behind_per_s, now_s = learner.behind_per_s(names), cycle.now_s
        traits, matches, expected, beside = [], [], [], crowds(candidates)
        for candidate, name, per_s, crowd in zip(candidates, names, behind_per_s, beside, strict=True):
            one = learner.traits(name) if name != tried else learner.typical()
            match = NO_MATCH if found is None else found.of(name)
            traits.append(one)
            matches.append(match)
            expected.append(expect(costs, one, candidate.load, match, prompt_tokens, per_s, crowd, now_s))
        scores = _scores(expected, candidates, min(BAND_MAX, max(BAND_MIN, learner.surprise / 2)))
        forecast = Forecast(scores, costs, traits, prompt_tokens, candidates, matches, behind_per_s, beside, now_s, tried)
        cycle.kept.setdefault(self.name, []).append((forecast, expected))
        return forecast

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        endpoint = decision.computes_prompt.name
        for candidate in cycle.candidates:
            if candidate.load.report is not None:
                self.learner.report(candidate.name, candidate.load.report)
        self._decisions += 1
        self._picked_at[endpoint] = self._decisions
        self._in_flight[decision.target.name] += 1
        work_s = 0.0
        for forecast, expected in cycle.kept.get(self.name, ()):
            forecast.choose(endpoint, expected)
            if forecast.chosen is not None:
                work_s = forecast.chosen.expected.prefill_s
                if forecast.tried == endpoint:
                    self._tried_at = self._decisions
        self.learner.arrived(endpoint, cycle.now_s, work_s)

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        self._in_flight[decision.target.name] -= 1
        if endpoint != decision.target.name:
            return  # a retry: what was expected was expected of another one
        computed_at = decision.computes_prompt.name
        chosen = self._chosen(decision)
        if chosen is None or not self.learner.knows(computed_at):
            return
        expected, match = chosen.expected, chosen.match
        cached, prompt_tokens = outcome.cached_tokens, outcome.prompt_tokens or decision.request.prompt_tokens
        if cached is not None and match.tokens and prompt_tokens:
            self.learner.cached(computed_at, match.source, min(match.tokens, max(1, prompt_tokens - 1)), cached, prompt_tokens)
        if not _shows_prefill(outcome):
            return
        assert outcome.ttft_s is not None
        uncached = expected.uncached_tokens if cached is None or not prompt_tokens else max(1, prompt_tokens - cached)
        self.learner.ttft(
            computed_at,
            Sample(
                ttft_s=outcome.ttft_s,
                other_s=expected.decode_wait_s + expected.tier_load_s - expected.elapsed_s,
                requests=expected.requests_ahead + 1,
                tokens=expected.tokens_ahead + uncached,
                pairs=expected.pairs_ahead + attention_pairs(uncached, max(uncached, prompt_tokens)),
            ),
        )
        decode_s = None if outcome.duration_s is None else outcome.duration_s - outcome.ttft_s
        self.learner.request(uncached, prompt_tokens or uncached, decode_s)
        if computed_at == endpoint and decode_s is not None and outcome.output_tokens is not None and outcome.output_tokens > 1:
            beside = (chosen.answering + max(0, self._in_flight[endpoint])) / 2
            self.learner.answer(1 + beside, outcome.output_tokens - 1, decode_s)

    def pool_changed(self, endpoints: Sequence[Endpoint]) -> None:
        names = {endpoint.name for endpoint in endpoints}
        self.learner.keep(names)
        self._picked_at = {name: at for name, at in self._picked_at.items() if name in names}
        self._in_flight = Counter({name: count for name, count in self._in_flight.items() if name in names})

    def _trial(self, candidates: Sequence[Candidate]) -> EndpointName | None:
        """Return who is rated as if it were like the others: of those that look slow the one that was left out longest."""
        due = self._decisions - TRIAL_EVERY
        if due < self._tried_at:
            return None
        slow = self.learner.typical().slowness * LOOKS_SLOW
        picked_at = self._picked_at
        waits = [
            one.name
            for one in candidates
            if picked_at.get(one.name, 0) <= due
            and not one.load.in_flight.prefill_requests
            and self.learner.traits(one.name).slowness > slow
        ]
        return min(waits, key=lambda name: picked_at.get(name, 0), default=None)

    def _chosen(self, decision: Decision) -> Chosen | None:
        """Return what was expected of who computes the prompt; None where this scorer did not rate it."""
        for run in decision.runs.values():
            for rating in run.ratings if run is not None else ():
                explained = rating.explained
                if isinstance(explained, Forecast) and rating.scorer == self.name and explained.chosen is not None:
                    return explained.chosen
        return None


def _shows_prefill(outcome: Outcome) -> bool:
    """Say whether the first token came when the prompt was computed: not so in an answer that came as a whole."""
    if outcome.ttft_s is None or outcome.ttft_s <= 0 or outcome.end not in {End.DONE, End.CLIENT_GONE, End.ENGINE_ERROR}:
        return False
    whole = outcome.duration_s is not None and outcome.duration_s - outcome.ttft_s < 0.01 * outcome.duration_s
    return not whole or outcome.output_tokens == 1 or outcome.end is not End.DONE


def _scores(expected: Sequence[Expected], candidates: Sequence[Candidate], band: float) -> list[float]:
    prices_s = [one.price_s for one in expected]
    edge_s = min(prices_s) * (1 + band)
    scores = [(1 - LOAD_SPREAD) * edge_s / price_s for price_s in prices_s]
    near = [at for at, price_s in enumerate(prices_s) if price_s <= edge_s]
    if len(near) == 1:
        scores[near[0]] = 1.0
        return scores
    keys = {at: (round(expected[at].uncached_tokens), candidates[at].load.in_flight.tokens) for at in near}
    order = sorted(set(keys.values()))
    ranks = {key: rank for rank, key in enumerate(order)}
    for at in near:
        scores[at] = 1 - LOAD_SPREAD * ranks[keys[at]] / len(order)
    return scores
