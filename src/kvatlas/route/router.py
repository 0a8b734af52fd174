"""``Router``: the route layer as one object, behind every front door and for embedding.

    flight = router.decide(RouteRequest(id="r1", model="llama", token_ids=tokens))
    flight.decision.target  # send it there, then tell how it went:
    flight.first_token(ttft_s=0.2)
    flight.finished(Outcome(end=End.DONE, cached_tokens=512))

Thread-safe: one lock around decisions and what is learnt from them; none of them waits for anything.
"""

from __future__ import annotations

import random as random_module
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from kvatlas.errors import ConfigError, NoCachedPrefixError, NoEndpointError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport, InFlight, Load, LoadBook, attention_pairs
from kvatlas.route.log import DecisionLog, Logged
from kvatlas.route.outcome import Outcome
from kvatlas.route.plugins import DecisionObserver, OutcomeObserver, PoolObserver, RemembersRoutes, ResponseHeaders
from kvatlas.route.request import RouteRequest
from kvatlas.route.scheduler import Scheduler


class Journal(Protocol):
    """Is told what other routers should know of this one, under its lock."""

    def in_flight_changed(self, endpoint: EndpointName) -> None:
        """Something was sent there, got its first token, or ended."""
        ...

    def sent(self, plugin: str, kind: str, endpoints: Sequence[EndpointName], chain: Sequence[int]) -> None:
        """A prompt was sent there, as a plugin remembers it (RemembersRoutes)."""
        ...


class Router:
    """Decides where requests go, and learns from how they went."""

    def __init__(
        self,
        scheduler: Scheduler,
        plugins: Mapping[str, object],
        *,
        clock: Callable[[], float] = time.monotonic,
        random: random_module.Random | None = None,
        log: DecisionLog | None = None,
        healthy: Callable[[EndpointName], bool] | None = None,
    ) -> None:
        """``plugins``: all that were made, by name; ``clock`` is the one that they were given.

        ``healthy``: who should get requests; None: everybody. Where nobody is, everybody does: what is known may be wrong.
        """
        self._scheduler = scheduler
        self._plugins = dict(plugins)
        self._clock = clock
        self._healthy = healthy
        self._random = random or random_module.Random()  # noqa: S311  spreads load, guards nothing
        self._lock = threading.RLock()
        self._loads = LoadBook()
        self._endpoints: dict[EndpointName, Endpoint] = {}
        self._on_decision = [one for one in self._plugins.values() if isinstance(one, DecisionObserver)]
        self._on_outcome = [one for one in self._plugins.values() if isinstance(one, OutcomeObserver)]
        self._on_pool = [one for one in self._plugins.values() if isinstance(one, PoolObserver)]
        self._on_response = [one for one in self._plugins.values() if isinstance(one, ResponseHeaders)]
        self._remembering = {name: one for name, one in self._plugins.items() if isinstance(one, RemembersRoutes)}
        self._journal: Journal | None = None
        self.log = log or DecisionLog()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Everyone a request could be sent to."""
        return tuple(self._endpoints.values())

    @property
    def plugins(self) -> Mapping[str, object]:
        """Every plugin, by name."""
        return self._plugins

    def plugin(self, name: str) -> object:
        """Return a plugin. Raises ConfigError where there is none of that name."""
        if name not in self._plugins:
            raise ConfigError("plugins", f"none is called {name!r:.80}", ", ".join(self._plugins))
        return self._plugins[name]

    def keep_journal(self, journal: Journal) -> None:
        """Tell from now on what other routers should know."""
        with self._lock:
            self._journal = journal

    def watch(self, observer: DecisionObserver | OutcomeObserver) -> None:
        """Tell somebody who is no plugin of decisions, and of how requests went: under the lock, so it must not wait."""
        with self._lock:
            if isinstance(observer, DecisionObserver):
                self._on_decision.append(observer)
            if isinstance(observer, OutcomeObserver):
                self._on_outcome.append(observer)

    def knows(self, endpoint: EndpointName) -> bool:
        """Whether an endpoint is in the pool."""
        return endpoint in self._endpoints

    def own_in_flight(self, endpoint: EndpointName) -> InFlight:
        """Return what was sent to an endpoint from here, without what other routers told."""
        with self._lock:
            return self._loads.own(endpoint)

    def others_in_flight(self, loads: Mapping[EndpointName, InFlight]) -> None:
        """Note what all other routers together have in flight. Of endpoints that are not in the pool: nothing happens."""
        with self._lock:
            for endpoint, in_flight in loads.items():
                if endpoint in self._endpoints:
                    self._loads.others(endpoint, in_flight)

    def sent_elsewhere(self, plugin: str, kind: str, endpoints: Sequence[EndpointName], chain: Sequence[int]) -> None:
        """Note that another router sent a prompt somewhere. Nothing happens where there is no such plugin or endpoint."""
        with self._lock:
            remembering = self._remembering.get(plugin)
            known = self._with_loads(self._endpoints[name] for name in endpoints if name in self._endpoints)
            if remembering is not None and known:
                remembering.learn(kind, known, chain, self._clock())

    def load(self, endpoint: EndpointName) -> Load:
        """Return how busy an endpoint is."""
        with self._lock:
            return self._loads.of(endpoint)

    def candidates(self) -> tuple[Candidate, ...]:
        """Return everyone with their load, as a decision would see them now."""
        with self._lock:
            return self._with_loads(self._endpoints.values())

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """Replace the pool. What is known of those that stay is kept; of those that go it is dropped."""
        with self._lock:
            now = {endpoint.name: endpoint for endpoint in endpoints}
            for gone in self._endpoints.keys() - now.keys():
                self._loads.forget(gone)
            self._endpoints = now
            for observer in self._on_pool:
                observer.pool_changed(tuple(now.values()))

    def report(self, endpoint: EndpointName, report: EngineReport) -> None:
        """Note what an engine said of itself. Of an endpoint that is not in the pool: nothing happens."""
        self.reports({endpoint: report})

    def reports(self, reports: Mapping[EndpointName, EngineReport]) -> None:
        """Note what several engines said of themselves, as one."""
        with self._lock:
            for endpoint, report in reports.items():
                if endpoint in self._endpoints:
                    self._loads.report(endpoint, report)

    def decide(self, request: RouteRequest) -> Flight:
        """Choose where a request goes; from now on it counts as in flight there.

        Raises NoEndpointError where nobody is left, and NoCachedPrefixError for ``if_cached`` where nobody holds a token.
        """
        with self._lock:
            cycle = self._cycle(request, self._random)
            decision = self._scheduler.decide(cycle)
            if request.if_cached and not decision.predicted_cached_tokens:
                raise NoCachedPrefixError()
            for observer in self._on_decision:
                observer.decided(cycle, decision)
            if self._journal is not None:
                self._tell(self._journal, cycle, decision)
            return Flight(self, decision, self.log.add(decision))

    def preview(self, request: RouteRequest) -> Decision:
        """Return where a request would go now. It is in no log, counts for no load, and no observer hears of it.

        Equal totals are drawn anew each time. Raises NoEndpointError where nobody is left.
        """
        with self._lock:
            return self._scheduler.decide(self._cycle(request, random_module.Random()))  # noqa: S311  guards nothing

    def response_headers(self, decision: Decision, endpoint: EndpointName) -> dict[str, str]:
        """Return the headers that plugins put on a request's response. ``endpoint``: who answers."""
        with self._lock:
            made = [one.response_headers(decision, endpoint) for one in self._on_response]
        return {name: value for headers in made for name, value in headers.items()}

    def _tell(self, journal: Journal, cycle: Cycle, decision: Decision) -> None:
        endpoints = tuple(dict.fromkeys((decision.target.name, decision.computes_prompt.name)))
        for name, plugin in self._remembering.items():
            for kind, chain in plugin.told(cycle).items():
                if chain:
                    journal.sent(name, kind, endpoints, chain)

    def _in_flight_changed(self, *endpoints: EndpointName) -> None:
        if self._journal is not None:
            for endpoint in endpoints:
                self._journal.in_flight_changed(endpoint)

    def _cycle(self, request: RouteRequest, random: random_module.Random) -> Cycle:
        """Return what a decision works on: those who may get the request, with their load."""
        healthy = allowed = self._allowed(request)
        if self._healthy is not None:
            healthy = [endpoint for endpoint in allowed if self._healthy(endpoint.name)] or allowed
        cycle = Cycle(request, self._with_loads(healthy), self._clock(), random)
        if len(healthy) < len(allowed):
            cycle.notes.append(f"{len(allowed) - len(healthy)} of {len(allowed)} endpoints are out of rotation")
        return cycle

    def _allowed(self, request: RouteRequest) -> list[Endpoint]:
        endpoints = list(self._endpoints.values())
        if request.subset is not None:
            endpoints = [one for one in endpoints if request.allows(one)]
            if not endpoints:
                raise NoEndpointError(f"none of the {len(self._endpoints)} endpoints is in the gateway's subset")
        return endpoints

    def _with_loads(self, endpoints: Iterable[Endpoint]) -> tuple[Candidate, ...]:
        of = self._loads.of
        return tuple([Candidate(endpoint, of(endpoint.name)) for endpoint in endpoints])


class Flight:
    """A request between its decision and its end: how it counts for load, and where its outcome is told. Ends once."""

    __slots__ = (
        "_at",
        "_ended",
        "_logged",
        "_prefill_at",
        "_prefill_pairs",
        "_prefill_tokens",
        "_prefilling",
        "_router",
        "_tokens",
        "decision",
    )

    def __init__(self, router: Router, decision: Decision, logged: Logged) -> None:
        self.decision = decision
        self._router = router
        self._logged = logged
        self._ended = False
        self._tokens = decision.request.prompt_tokens
        self._depart(decision.target.name, decision.computes_prompt.name, decision.predicted_cached_tokens or 0)

    @property
    def endpoint(self) -> EndpointName:
        """Who has the request now."""
        return self._at

    @property
    def ended(self) -> bool:
        return self._ended

    def moved(self, endpoint: EndpointName) -> None:
        """The request is sent to another endpoint instead (a retry). Nothing is taken to be cached there."""
        with self._router._lock:
            if not self._ended:
                self._arrive()
                self._depart(endpoint, endpoint, 0)
                self._logged.moved(endpoint)

    def first_token(self, ttft_s: float) -> None:
        """The first token came: the prompt is computed."""
        with self._router._lock:
            if self._prefilling and not self._ended:
                self._end_prefill()
                self._logged.first_token(ttft_s)

    def finished(self, outcome: Outcome) -> bool:
        """The request ended, in whatever way. Return whether this was told for the first time; later calls do nothing."""
        with self._router._lock:
            if self._ended:
                return False
            self._ended = True
            self._arrive()
            self._logged.finished(outcome)
            for observer in self._router._on_outcome:
                observer.finished(self.decision, self._at, outcome)
            return True

    def _depart(self, at: EndpointName, prefill_at: EndpointName, cached_tokens: int) -> None:
        self._at = at
        self._prefill_at = prefill_at
        self._prefill_tokens = tokens = max(0, self._tokens - cached_tokens)
        self._prefill_pairs = round(attention_pairs(tokens, self._tokens))
        self._prefilling = True
        loads = self._router._loads
        loads.prefill_began(prefill_at, tokens, self._prefill_pairs, self._router._clock())
        for endpoint in {at, prefill_at}:
            loads.began(endpoint, self._tokens)
        self._router._in_flight_changed(at, prefill_at)

    def _end_prefill(self) -> None:
        self._prefilling = False
        loads = self._router._loads
        loads.prefill_ended(self._prefill_at, self._prefill_tokens, self._prefill_pairs, self._router._clock())
        if self._prefill_at != self._at:
            loads.ended(self._prefill_at, self._tokens)
        self._router._in_flight_changed(self._prefill_at)

    def _arrive(self) -> None:
        if self._prefilling:
            self._end_prefill()
        self._router._loads.ended(self._at, self._tokens)
        self._router._in_flight_changed(self._at)
