"""``session-affinity-scorer`` and ``session-affinity-filter``: later requests of a session go where its first one went."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, Protocol

import msgspec

from kvatlas.errors import ConfigError
from kvatlas.route.cycle import Candidate, Cycle
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.plugins import Services
from kvatlas.route.request import RouteRequest
from kvatlas.route.scorers.sessions import SessionStore

TOKEN_HEADER = "x-session-token"  # noqa: S105  a header's name
ID_HEADER = "x-session-id"
ABSENT = "absent"
"""Kept in a cycle where the session's endpoint is not among the candidates."""

Seconds = Annotated[float, msgspec.Meta(gt=0)]


class EncodedEndpointHeaderParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    header: str = TOKEN_HEADER


class SessionIdSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Where a session's id is read from."""

    header: str = ""
    attribute: str = ""
    producer: str = ""
    """Both for attributes that llm-d's request plugins make; there are none here."""


class SessionIdParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    sources: tuple[SessionIdSource, ...] = ()
    """The first one that yields something counts; none: the header x-session-id."""
    eviction_ttl_seconds: Seconds = 300.0
    """A session that was not used for so long is forgotten."""
    eviction_sweep_seconds: Seconds = 10.0


class SessionAffinityParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    strategy: Literal["encoded_endpoint_header", "session_id"] = "encoded_endpoint_header"
    """The first: the client sends back a header of the response. The second: the client has an id, the router remembers."""
    encoded_endpoint_header_config: EncodedEndpointHeaderParameters = EncodedEndpointHeaderParameters()
    session_id_config: SessionIdParameters = SessionIdParameters()
    profile_name: str = ""
    """Whose pick the session stays with; empty: the profile that chose the target."""


class Strategy(Protocol):
    """How a session is known again."""

    def position(self, cycle: Cycle, candidates: Sequence[Candidate]) -> int | None:
        """Return which candidate the session is at; None where it is new, or at none of them."""
        ...

    def decided(self, cycle: Cycle, picked: EndpointName) -> None: ...

    def moved(self, request: RouteRequest, endpoint: EndpointName) -> None:
        """A retry elsewhere went well."""
        ...

    def response_headers(self, picked: EndpointName) -> Mapping[str, str]: ...


class EncodedEndpoint:
    """The client carries the endpoint's name: base64 of ``namespace/name`` in a header. Nothing is remembered here.

    A header that is no base64, or names nobody there, counts as none.
    """

    def __init__(self, header: str) -> None:
        self._header = header

    def position(self, cycle: Cycle, candidates: Sequence[Candidate]) -> int | None:
        token = cycle.request.headers.get(self._header)
        if not token:
            return None
        try:
            name = base64.b64decode(token, validate=True).decode()
        except ValueError:
            return None
        return _position(name, candidates)

    def decided(self, cycle: Cycle, picked: EndpointName) -> None:
        """Nothing is remembered."""

    def moved(self, request: RouteRequest, endpoint: EndpointName) -> None:
        """The response named the endpoint."""

    def response_headers(self, picked: EndpointName) -> Mapping[str, str]:
        return {self._header: base64.b64encode(picked.encode()).decode()}


class SessionId:
    """The client sends an id of its own; the router remembers where its first request went.

    A session moves where its endpoint is not among the candidates, or a retry elsewhere went well; not because other scorers
    chose somebody else.
    """

    def __init__(self, plugin: str, headers: tuple[str, ...], store: SessionStore, clock: Callable[[], float]) -> None:
        self._plugin = plugin
        self._headers = headers
        self._store = store
        self._clock = clock

    def position(self, cycle: Cycle, candidates: Sequence[Candidate]) -> int | None:
        cycle.kept.pop(self._plugin, None)
        session = self._session(cycle.request)
        bound = None if session is None else self._store.get(session, cycle.now_s)
        if bound is None:
            return None
        position = _position(bound, candidates)
        if position is None:
            cycle.kept[self._plugin] = ABSENT
        return position

    def decided(self, cycle: Cycle, picked: EndpointName) -> None:
        session = self._session(cycle.request)
        if session is None:
            return
        moves = cycle.kept.get(self._plugin) is ABSENT
        if moves or self._store.get(session, cycle.now_s) in {None, picked}:
            self._store.bind(session, picked, cycle.now_s)

    def moved(self, request: RouteRequest, endpoint: EndpointName) -> None:
        if (session := self._session(request)) is not None:
            self._store.bind(session, endpoint, self._clock())

    def response_headers(self, picked: EndpointName) -> Mapping[str, str]:
        return {}

    def _session(self, request: RouteRequest) -> str | None:
        for header in self._headers:
            if value := request.headers.get(header, "").strip():
                return value
        return None


class SessionAffinity:
    """What scorer and filter have in common."""

    Parameters = SessionAffinityParameters

    def __init__(self, name: str, parameters: SessionAffinityParameters, services: Services) -> None:
        """Raises ConfigError for a source of ids that is not a header."""
        self.name = name
        self._profile = parameters.profile_name
        self._strategy = _strategy(name, parameters, services)

    def decided(self, cycle: Cycle, decision: Decision) -> None:
        if (picked := self._picked(decision)) is not None:
            self._strategy.decided(cycle, picked)

    def finished(self, decision: Decision, endpoint: EndpointName, outcome: Outcome) -> None:
        if outcome.end is End.DONE and endpoint != decision.target.name and not self._profile:
            self._strategy.moved(decision.request, endpoint)

    def response_headers(self, decision: Decision, endpoint: EndpointName) -> Mapping[str, str]:
        picked = self._picked(decision) if self._profile else endpoint
        return {} if picked is None else self._strategy.response_headers(picked)

    def _picked(self, decision: Decision) -> EndpointName | None:
        if not self._profile:
            return decision.target.name
        run = decision.runs.get(self._profile)
        return None if run is None else run.picked[0].name


class SessionAffinityScorer(SessionAffinity):
    """1 for the endpoint that a session is at, 0 for the others. Source: llm-d-router, session-affinity-scorer."""

    def score(self, cycle: Cycle, candidates: Sequence[Candidate]) -> list[float]:
        scores = [0.0] * len(candidates)
        if (position := self._strategy.position(cycle, candidates)) is not None:
            scores[position] = 1.0
        return scores


class SessionAffinityFilter(SessionAffinity):
    """Keeps the endpoint that a session is at; all where it is at none. Source: llm-d-router, session-affinity-filter."""

    def filter(self, cycle: Cycle, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        position = self._strategy.position(cycle, candidates)
        return candidates if position is None else (candidates[position],)


def _position(name: str, candidates: Sequence[Candidate]) -> int | None:
    for position, one in enumerate(candidates):
        if one.endpoint.name == name:
            return position
    return None


def _strategy(plugin: str, parameters: SessionAffinityParameters, services: Services) -> Strategy:
    if parameters.strategy == "encoded_endpoint_header":
        return EncodedEndpoint(parameters.encoded_endpoint_header_config.header.strip().lower() or TOKEN_HEADER)
    config = parameters.session_id_config
    headers = []
    for number, source in enumerate(config.sources or (SessionIdSource(header=ID_HEADER),)):
        header = source.header.strip().lower()
        if not header or source.attribute:
            raise ConfigError(
                f"{plugin}.sessionIdConfig.sources[{number}]",
                "names no header, or an attribute",
                "{header: NAME}; no plugin here makes request attributes",
            )
        headers.append(header)
    store = SessionStore(config.eviction_ttl_seconds, config.eviction_sweep_seconds)
    return SessionId(plugin, tuple(headers), store, services.clock)
