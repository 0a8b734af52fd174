"""``benchmarks.routing_live`` on a virtual clock: the same traces, users and pauses, before simulated engines of the same kind.

``python -m tests.models.replay [seeds]`` prints cached shares and times to first token of some policies.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from statistics import mean
from typing import NamedTuple

import msgspec

from benchmarks.routing_live import CASES, ENGINES, TURNS_MAX, WORKLOADS, Case, Workload
from benchmarks.sides.sessions import Request, next_sessions
from kvatlas.sim.choice import make_engines
from kvatlas.sim.fleet import simulate
from kvatlas.sim.live.requests import read_generation
from kvatlas.sim.live.tokens import EngineTokens, packaged_tokenizer
from kvatlas.sim.policies.policy import MODEL
from kvatlas.sim.results import PhaseResult
from kvatlas.sim.workloads.texts import Texts
from kvatlas.sim.workloads.workload import Arrival
from tests.models.scenarios import OURS, policy_of

POLICIES = ("round robin", "cache aware", "prefix only", OURS)
CASE_S = 36_000.0
"""From the beginning of a case to that of the next one: longer than any takes."""


class Turn(NamedTuple):
    """One request of a session."""

    prompt: array[int]
    output_tokens: int


Session = Sequence[Turn]


class Users:
    """So many, each with one session after the other; the cases one after the other, with other sessions."""

    name = "replay"

    def __init__(self, sessions: Sequence[Session], seed: int) -> None:
        left = iter(sessions)
        self._left = {case.name: iter(next_sessions(left, case.requests)) for case in CASES}
        self._cases = {case.name: case for case in CASES}
        self._seed = seed
        self._texts = Texts()
        self._playing: list[tuple[Iterator[Turn], random.Random]] = []
        """By session: what is to come, and its pauses."""

    def arrivals(self) -> Iterator[Arrival]:
        for number, case in enumerate(CASES):
            begin = (self._begin(case, number * CASE_S) for _ in range(case.users))
            yield from sorted((arrival for arrival in begin if arrival is not None), key=lambda arrival: arrival.at_s)

    def after(self, answered: Arrival, at_s: float) -> Arrival | None:
        assert answered.session is not None
        case = self._cases[answered.phase]
        return self._go_on(case, answered.session, at_s) or self._begin(case, at_s)

    def _begin(self, case: Case, now_s: float) -> Arrival | None:
        session = next(self._left[case.name], None)
        if session is None:
            return None
        number = len(self._playing)
        self._playing.append((iter(session), random.Random(self._seed * 100_003 + number)))
        return self._go_on(case, number, now_s)

    def _go_on(self, case: Case, session: int, now_s: float) -> Arrival | None:
        turns, pauses = self._playing[session]
        turn = next(turns, None)
        if turn is None:
            return None
        at_s = now_s + pauses.expovariate(1 / case.pause_s)
        tokens = turn.prompt + self._texts.new(turn.output_tokens)
        return Arrival(at_s, tokens, len(turn.prompt), session, phase=case.name)


@cache
def sessions_of(workload: str, seed: int) -> list[Session]:
    """Return a trace's sessions in a seed's order, as tokens."""
    known = next(one for one in WORKLOADS if one.name == workload)
    return [[_turn(msgspec.json.encode(request)) for request in session] for session in known.sessions(seed, TURNS_MAX)]


@cache
def _tokens() -> EngineTokens:
    with packaged_tokenizer() as directory:
        return EngineTokens(MODEL, directory)


@cache
def _turn(encoded: bytes) -> Turn:
    request = msgspec.json.decode(encoded, type=Request)
    asked = read_generation(request.path, MODEL, msgspec.json.encode(request.body))
    assert asked.prompt is not None
    assert asked.output_tokens is not None
    return Turn(_tokens().tokens(asked.prompt), asked.output_tokens)


def replay(workload: Workload, policy: str, seed: int) -> dict[str, PhaseResult]:
    """Play both cases, one after the other; return what each showed."""
    result = simulate(
        Users(sessions_of(workload.name, seed), seed),
        "sglang-cache-aware" if policy == "cache aware" else policy_of(policy),
        [workload.engine] * ENGINES,
        seed=seed,
        engines=make_engines(),
    )
    assert result.arrived == result.finished, result
    return {phase.name: phase for phase in result.phases}


def table(policies: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    for workload in WORKLOADS:
        found = {policy: [replay(workload, policy, seed) for seed in seeds] for policy in policies}
        for case in CASES:
            for policy, seen in found.items():
                phases = [one[case.name] for one in seen]
                times_s = (mean(getattr(phase.ttft, name) for phase in phases) for name in ("mean", "p50", "p90"))
                times = " / ".join(f"{1e3 * one:4.0f}" for one in times_s)
                hits = mean(phase.hit_ratio for phase in phases)
                yield f"{workload.name:9} {case.name:11} {policy:15} {hits:6.1%}  {times} ms"


if __name__ == "__main__":
    for line in table(POLICIES, range(1, 1 + int((sys.argv[1:] or ["3"])[0]))):
        print(line)
