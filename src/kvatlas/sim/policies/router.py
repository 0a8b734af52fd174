"""The project's own router as a policy: the decision code of the service, on a virtual clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from kvatlas.indexer import Indexer
from kvatlas.route.endpoint import Endpoint, EndpointName
from kvatlas.route.load import EngineReport
from kvatlas.route.log import DecisionLog
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.picker_config import PickerConfig, build_router
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Flight
from kvatlas.sim.engines import EngineSpec, EngineState
from kvatlas.sim.policies.indexing import make_indexer
from kvatlas.sim.policies.policy import MODEL, Surroundings, engine_name
from kvatlas.sim.request import Request
from kvatlas.types import PodId

HEAR_EVENTS = frozenset({"precise-prefix-cache-producer", "blended-prefix-cache-producer"})
"""Types of plugins that ask the index."""


class RouterPolicy:
    """Decides as an EndpointPickerConfig says."""

    hears_reports = True

    def __init__(self, name: str, config: PickerConfig, surroundings: Surroundings) -> None:
        """Raises ConfigError where plugins do not fit together."""
        self.name = name
        hears_events = any(plugin.type in HEAR_EVENTS for plugin in config.plugins)
        self.indexer: Indexer | None = make_indexer(surroundings) if hears_events else None
        self._failures: Counter[str] = Counter()
        self._clock = surroundings.clock
        self.router = build_router(
            config,
            index=self.indexer,
            clock=surroundings.clock,
            random=surroundings.random,
            failed=self._failed,
            log=DecisionLog(1),
        )
        self._endpoints: dict[int, Endpoint] = {}
        self._numbers: dict[EndpointName, int] = {}
        self._specs: dict[int, EngineSpec] = {}
        self._flights: dict[int, Flight] = {}
        """By request."""

    @property
    def notes(self) -> Sequence[str]:
        return [f"{count} times {what} failed in a decision" for what, count in sorted(self._failures.items())]

    def joins(self, engine: int, spec: EngineSpec) -> None:
        name = engine_name(engine)
        self._specs[engine] = spec
        self._numbers[EndpointName(name)] = engine
        self._endpoints[engine] = Endpoint(name=EndpointName(name), address=name, port=8000, pod=PodId(name))
        self.router.set_endpoints(list(self._endpoints.values()))

    def leaves(self, engine: int) -> None:
        endpoint = self._endpoints.pop(engine)
        del self._numbers[endpoint.name], self._specs[engine]
        self.router.set_endpoints(list(self._endpoints.values()))

    def reports(self, states: Mapping[int, EngineState], at_s: float) -> None:
        self.router.reports({self._endpoints[at].name: _report(self._specs[at], state, at_s) for at, state in states.items()})

    def choose(self, request: Request) -> int:
        flight = self.router.decide(RouteRequest(id=str(request.id), model=MODEL, token_ids=request.prompt))
        self._flights[request.id] = flight
        return self._numbers[flight.endpoint]

    def first_token(self, request: Request, at_s: float) -> None:
        self._flights[request.id].first_token(at_s - request.sent_s)

    def ended(self, request: Request, at_s: float, end: End) -> None:
        first_s = request.first_token_s
        arrival = request.arrival
        self._flights.pop(request.id).finished(
            Outcome(
                end=end,
                ttft_s=None if first_s is None else first_s - request.sent_s,
                duration_s=at_s - request.sent_s,
                prompt_tokens=arrival.prompt_tokens,
                cached_tokens=request.cached_tokens if end is End.DONE else None,
                output_tokens=arrival.output_tokens if end is End.DONE else None,
            )
        )

    def predicted_cached_tokens(self, request: Request) -> int | None:
        """Return what the decision on a request in flight counts on; None where nothing could tell."""
        return self._flights[request.id].decision.predicted_cached_tokens

    def _failed(self, plugin: str, error: Exception) -> None:
        self._failures[f"{plugin} ({type(error).__name__})"] += 1


def _report(spec: EngineSpec, state: EngineState, at_s: float) -> EngineReport:
    return EngineReport(
        at_s=at_s,
        waiting=state.waiting,
        running=state.running,
        kv_usage=spec.kv_usage(state.blocks_used),
        block_size_tokens=spec.block_size_tokens,
        gpu_blocks=spec.gpu_blocks,
    )
