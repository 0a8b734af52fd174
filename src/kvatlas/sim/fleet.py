"""A fleet on a virtual clock: users, a routing policy, engines, and what travels between them.

    result = simulate(workload, "kvatlas", [spec] * 8, seed=1, engines=ReferenceEngines())

The same arguments give the same result, bit for bit, but for how long it took.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvatlas.route.outcome import End
from kvatlas.sim.chains import Chains
from kvatlas.sim.changes import Change, EngineJoins, EngineSlows
from kvatlas.sim.engines import NO_TOKENS, Engines, EngineSpec, Events, Happening, Job, Kind
from kvatlas.sim.events import EventPath, EventStreams
from kvatlas.sim.policies import Policy, PolicyMaker, Surroundings, make_policy
from kvatlas.sim.policies.policy import MODEL, engine_name
from kvatlas.sim.request import Request
from kvatlas.sim.results import RunResult
from kvatlas.sim.tally import Tally
from kvatlas.sim.workloads.workload import Arrival, Workload

REPORT_EVERY_S = 0.05
"""llm-d's and our default of how often engines' metrics are read."""
SAMPLE_EVERY_S = 0.25
"""How often queues are looked at for the result's means."""
PROGRESS_EVERY = 1024
"""Arrivals."""

Progress = Callable[[float, int, int], None]
"""Called with the virtual time, and how many requests have arrived and were answered."""

_ROUNDING = 1e-9
"""Of intervals: a time that was computed from a count of them is not a little less."""

DIRECT = EventPath()
"""Events are known at once, and none is lost."""

_SCHEDULED, _FIRST_TOKEN, _FINISHED, _PREEMPTED, _STORED, _REMOVED, _REFUSED, _PUBLISHED = map(int, Kind)


def simulate(
    workload: Workload,
    policy: str | PolicyMaker,
    specs: Sequence[EngineSpec],
    *,
    seed: int,
    engines: Engines,
    path: EventPath = DIRECT,
    report_every_s: float = REPORT_EVERY_S,
    in_flight_max: int | None = None,
    changes: Sequence[Change] = (),
    arrivals_until_s: float = math.inf,
    ends_s: float = math.inf,
    progress: Progress | None = None,
) -> RunResult:
    """Send a workload through a fleet, and return what its users and engines saw.

    ``policy``: a name or a file, as for :func:`kvatlas.sim.policies.make_policy`, or what makes one. ``engines``: without any
    in it yet. ``path``: of events; it does nothing where the policy hears none. ``in_flight_max``: who comes while so many
    are not answered is refused at once, as by a gateway that bounds what it has open. ``arrivals_until_s``: who would come
    later does not come; ``ends_s``: whoever is not answered then is left out of the result but for ``arrived``. Raises
    ConfigError for a policy that is none, ValueError for values that engines refuse.
    """
    began_s = time.perf_counter()
    fleet = _Fleet(
        workload,
        policy,
        specs,
        seed=seed,
        engines=engines,
        path=path,
        report_every_s=report_every_s,
        in_flight_max=in_flight_max,
    )
    fleet.plan(changes)
    fleet.run(min(arrivals_until_s, ends_s), ends_s, progress)
    return fleet.result(seed, time.perf_counter() - began_s)


class _Departure(NamedTuple):
    """A client goes, if its request is not answered by then."""

    request: int
    waiting: bool
    """Only if it has no token."""


class _Fleet:
    """One run."""

    def __init__(
        self,
        workload: Workload,
        policy: str | PolicyMaker,
        specs: Sequence[EngineSpec],
        *,
        seed: int,
        engines: Engines,
        path: EventPath,
        report_every_s: float,
        in_flight_max: int | None,
    ) -> None:
        if not report_every_s > 0:
            raise ValueError(f"report_every_s: expected more than 0, got {report_every_s}; inf for never")
        self._now_s = 0.0
        self._workload = workload
        self._engines = engines
        self._report_every_s = report_every_s
        self._size = min([spec.block_size_tokens for spec in specs], default=16)
        self._chains = {self._size: Chains(self._size, MODEL)}
        surroundings = Surroundings(
            clock=lambda: self._now_s,
            random=random.Random(f"policy {seed}"),  # noqa: S311  reproducible, guards nothing
            block_size_tokens=self._size,
            blocks=sum(spec.gpu_blocks + sum(tier.blocks for tier in spec.tiers) for spec in specs),
        )
        self._policy: Policy = make_policy(policy, surroundings) if isinstance(policy, str) else policy(surroundings)
        self._tally = Tally()
        self._names: list[str] = []
        self._specs: dict[int, EngineSpec] = {}
        self._streams: EventStreams | None = None
        """None: the policy hears no events."""
        if self._policy.indexer is not None:
            event_random = random.Random(f"events {seed}")  # noqa: S311  the same
            self._streams = EventStreams(MODEL, self._policy.indexer, path, event_random)
        self._requests: dict[int, Request] = {}
        self._planned: list[tuple[float, int, Arrival | Change | _Departure]] = []
        """A heap: who goes on after an answer, who goes without one, and what happens to the fleet."""
        self._order = itertools.count()
        self._ids = itertools.count()
        self._reported = 0
        """How many report intervals have been told."""
        self._foreign_lost = 0
        self._sample_s = 0.0
        self._in_flight_max = in_flight_max
        self._sent_again = self._found_nobody = self._beyond_bound = 0
        for spec in specs:
            self._join(spec)

    # -- time ---------------------------------------------------------------------------------------------------------

    def plan(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._plan_at(change.at_s, change)

    def _plan_at(self, at_s: float, planned: Arrival | Change | _Departure) -> None:
        heapq.heappush(self._planned, (at_s, next(self._order), planned))

    def run(self, arrivals_until_s: float, ends_s: float, progress: Progress | None) -> None:
        """Go on until nobody comes any more and everybody is answered, or the end."""
        source = itertools.takewhile(lambda arrival: arrival.at_s <= arrivals_until_s, self._workload.arrivals())
        coming = next(source, None)
        events = Events.NOTHING if self._streams is None else Events.FRAMES
        while self._now_s < ends_s:
            self._drop_departures()
            due_s = min(math.inf if coming is None else coming.at_s, self._planned[0][0] if self._planned else math.inf)
            if due_s == math.inf and not self._requests:
                break
            stop_s = min(self._pause_s(due_s), ends_s)
            self._now_s, told = self._engines.run(stop_s, events=events)
            self._heed(told, arrivals_until_s)
            if self._now_s < stop_s:
                continue
            if stop_s < due_s:
                self._look()
            elif coming is not None and coming.at_s <= due_s:
                self._arrive(coming)
                coming = next(source, None)
                if progress is not None and self._tally.arrived % PROGRESS_EVERY == 0:
                    progress(self._now_s, self._tally.arrived, self._tally.finished)
            else:
                self._happens(heapq.heappop(self._planned)[2])

    def _pause_s(self, due_s: float) -> float:
        """Return when to stop next: when something is due, or somebody has to look at the engines before."""
        pause_s = min(due_s, max(self._now_s, self._sample_s)) if self._requests else due_s
        if self._policy.hears_reports and due_s < math.inf:
            reports = int(due_s / self._report_every_s)  # of several before something is due the last one is all that counts
            if reports > self._reported:
                pause_s = min(pause_s, max(self._now_s, reports * self._report_every_s))
        return pause_s

    def _look(self) -> None:
        """Read engines' metrics, for the policy and for the result."""
        reports = int(self._now_s / self._report_every_s + _ROUNDING)
        if self._policy.hears_reports and reports > self._reported:
            self._reported = reports
            metrics_of = self._engines.metrics
            self._policy.reports({engine: metrics_of(engine) for engine in self._specs}, self._now_s)
        if self._now_s >= self._sample_s:
            states = {engine: self._engines.state(engine) for engine in self._specs}
            idle = int((self._now_s - self._sample_s) / SAMPLE_EVERY_S)  # nobody looks while nothing is in flight
            self._tally.sampled(self._specs, states, self._now_s, idle)
            self._sample_s += (1 + idle) * SAMPLE_EVERY_S
        if self._streams is not None:
            self._streams.expire(self._now_s)

    # -- the fleet ----------------------------------------------------------------------------------------------------

    def _happens(self, planned: Arrival | Change | _Departure) -> None:
        if isinstance(planned, Arrival):
            self._arrive(planned)
        elif isinstance(planned, _Departure):
            self._depart(planned)
        elif isinstance(planned, EngineSlows):
            self._check_there(planned.engine)
            self._engines.slow(planned.engine, planned.factor, self._now_s)
        elif isinstance(planned, EngineJoins):
            self._join(planned.spec)
        else:
            self._leave(planned.engine)

    def _join(self, spec: EngineSpec) -> None:
        engine = self._engines.join(spec, self._now_s)
        if engine != len(self._names):
            raise ValueError("engines: expected none in it yet; make new ones for each run")
        self._specs[engine] = spec
        name = engine_name(engine)
        self._names.append(name)
        self._tally.engine_joined()
        if self._streams is not None:
            self._streams.joins(engine, name)
        self._policy.joins(engine, spec)

    def _leave(self, engine: int) -> None:
        self._check_there(engine)
        self._tally.engine_ends(engine, self._engines.state(engine))
        left = [self._requests[job] for job in self._engines.leave(engine, self._now_s)]
        del self._specs[engine]
        for request in left:
            self._told_end(request, self._now_s, End.ENGINE_ERROR)
        self._policy.leaves(engine)
        if self._streams is not None:
            self._streams.leaves(engine)
        for request in left:
            if request.foreign:
                self._lose(request)
            else:
                self._sent_again += 1
                self._send(request)

    def _check_there(self, engine: int) -> None:
        if engine not in self._specs:
            told = f"changes: engine {engine} is not there at {self._now_s} s"
            raise ValueError(f"{told}; name one that has joined and not left: the first is 0")

    # -- requests -----------------------------------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        if arrival.engine is not None:
            self._pass_by(self._coming(arrival), arrival.engine)
            return
        self._tally.arrives(self._now_s, arrival.phase)
        if self._in_flight_max is not None and self._in_flight() >= self._in_flight_max:
            self._beyond_bound += 1
            self._tally.refused += 1
            return
        self._send(self._coming(arrival))

    def _in_flight(self) -> int:
        """Return how many requests of the router's are not answered yet."""
        return sum(not request.foreign for request in self._requests.values())

    def _coming(self, arrival: Arrival) -> Request:
        """Return a request that is there from now on, until it is answered or its client goes."""
        keys = self._chains[self._size].keys(arrival.tokens, arrival.session)
        request = Request(next(self._ids), arrival, self._now_s, keys, arrival.prompt_tokens // self._size)
        self._requests[request.id] = request
        if arrival.patience_s is not None:
            self._plan_at(arrival.at_s + arrival.patience_s, _Departure(request.id, waiting=True))
        if arrival.cancel_after_s is not None:
            self._plan_at(arrival.at_s + arrival.cancel_after_s, _Departure(request.id, waiting=False))
        return request

    def _send(self, request: Request) -> None:
        """Let the policy choose, by all that it can know by now."""
        if not self._specs:
            self._found_nobody += 1
            self._refuse(request)
            return
        if self._streams is not None:
            self._streams.deliver(self._now_s)
        request.routed = True
        request.sent(self._policy.choose(request), self._now_s)
        self._add(request)

    def _pass_by(self, request: Request, engine: int) -> None:
        """Give a request to the engine that it is meant for, behind the policy's back."""
        self._tally.foreign += 1
        if engine not in self._specs:
            self._lose(request)
            return
        request.routed = False
        request.sent(engine, self._now_s)
        self._add(request)

    def _drop_departures(self) -> None:
        """Forget about clients who would go next, and have what they wait for."""
        while self._planned and isinstance(going := self._planned[0][2], _Departure) and self._leaving(going) is None:
            heapq.heappop(self._planned)

    def _leaving(self, going: _Departure) -> Request | None:
        request = self._requests.get(going.request)
        return None if request is None or (going.waiting and request.first_token_s is not None) else request

    def _depart(self, going: _Departure) -> None:
        request = self._leaving(going)
        if request is None:  # it got it at this very time
            return
        self._engines.abort(request.engine, request.id, self._now_s)
        self._told_end(request, self._now_s, End.CLIENT_GONE)
        if not request.foreign:
            self._tally.cancels(request)
        del self._requests[request.id]

    def _lose(self, request: Request) -> None:
        self._foreign_lost += 1
        del self._requests[request.id]

    def _add(self, request: Request) -> None:
        arrival, size = request.arrival, self._specs[request.engine].block_size_tokens
        keys = request.job_keys = request.keys if size == self._size else self._keys(arrival, size)
        tokens = NO_TOKENS if self._streams is None else arrival.tokens
        job = Job(request.id, keys, arrival.prompt_tokens, arrival.output_tokens, tokens)
        self._engines.add(request.engine, job, self._now_s)

    def _keys(self, arrival: Arrival, size: int) -> array[int]:
        """Return keys for an engine with larger blocks than others have."""
        if size not in self._chains:
            self._chains[size] = Chains(size, MODEL)
        return self._chains[size].keys(arrival.tokens, arrival.session)

    # -- what engines tell --------------------------------------------------------------------------------------------

    def _heed(self, told: Sequence[Happening], arrivals_until_s: float) -> None:
        for happening in told:
            at_s, kind, engine, job, first, many, _, _, payload = happening
            if kind == _PUBLISHED:
                assert self._streams is not None  # otherwise engines are not asked for frames
                self._streams.publish(engine, at_s, payload)
            elif kind == _SCHEDULED:
                request = self._requests[job]
                request.scheduled_s = at_s
                request.cached_tokens, request.loaded_tokens = first + many, many
            elif kind == _FIRST_TOKEN:
                request = self._requests[job]
                request.first_token_s = at_s
                if request.routed:
                    self._policy.first_token(request, at_s)
                if not request.foreign:
                    self._tally.first_token(request, at_s)
            elif kind == _FINISHED:
                self._answered(self._requests.pop(job), at_s, arrivals_until_s)
            elif kind == _REFUSED:
                self._refused(self._requests[job])

    def _answered(self, request: Request, at_s: float, arrivals_until_s: float) -> None:
        self._told_end(request, at_s, End.DONE)
        if not request.foreign:
            self._tally.answered(request, at_s)
        following = self._workload.after(request.arrival, at_s)
        if following is not None and following.at_s <= arrivals_until_s:
            self._plan_at(max(following.at_s, at_s), following)

    def _refused(self, request: Request) -> None:
        """It does not fit into its engine: send it to the one with the most room, whatever the policy says, or give it up."""
        self._told_end(request, self._now_s, End.REFUSED)
        if request.foreign:
            self._lose(request)
            return
        rooms = {engine: spec.gpu_blocks * spec.block_size_tokens for engine, spec in self._specs.items()}
        largest = max(rooms, key=rooms.__getitem__)
        if rooms[largest] > rooms[request.engine]:
            request.routed = False
            request.sent(largest, self._now_s)
            self._add(request)
        else:
            self._refuse(request)

    def _told_end(self, request: Request, at_s: float, end: End) -> None:
        if request.routed:
            self._policy.ended(request, at_s, end)

    def _refuse(self, request: Request) -> None:
        self._tally.refused += 1
        del self._requests[request.id]

    # -- the result ---------------------------------------------------------------------------------------------------

    def result(self, seed: int, wall_s: float) -> RunResult:
        states = {engine: self._engines.state(engine) for engine in self._specs}
        self._tally.queues(states.values())
        for engine, state in states.items():
            self._tally.engine_ends(engine, state)
        return self._tally.result(
            policy=self._policy.name,
            workload=self._workload.name,
            seed=seed,
            names=self._names,
            wall_s=wall_s,
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        counts = {
            "clients gave up before the first token": self._tally.gave_up,
            "clients cancelled their answer": self._tally.cancelled,
            "requests reached engines without passing the router": self._tally.foreign,
            "of these were lost: their engine left, was not there, or is too small": self._foreign_lost,
            "requests were sent again: their engine left": self._sent_again,
            "requests were refused: no engine was there": self._found_nobody,
            "requests were refused: as many as may be were in flight": self._beyond_bound,
            "requests were not answered when the run ended": self._in_flight(),
            **({} if self._streams is None else self._streams.counts()),
        }
        return [f"{count} {what}" for what, count in counts.items() if count] + list(self._policy.notes)
