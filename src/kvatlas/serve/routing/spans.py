"""What a trace tells of one routed request: a span from its arrival until the end of its answer, with an event for each step.

It holds no text and no tokens of the prompt. Names are OpenTelemetry's semantic conventions', else ``kvatlas.*``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from kvatlas.errors import RequestError, RouteError
from kvatlas.observe.traces import Traces
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.outcome import End, Outcome
from kvatlas.serve.routing.explain import match_at, why

if TYPE_CHECKING:
    from opentelemetry.trace import Span

NAME = "kvatlas.route"
PATH_MAX = 200
TRACESTATE = "tracestate"

Attribute = str | int | float | None
"""None: not known, and left out."""

_FAILED = {End.ENGINE_ERROR, End.UNREACHABLE}


class RequestSpan(Protocol):
    """Is told of a request's steps, in their order. Ends with ``refused`` or ``finished``."""

    def step(self, name: str) -> None:
        """A step was done: read, tokens, admission, decide, first token."""
        ...

    def decided(self, decision: Decision) -> None: ...

    def moved(self, endpoint: EndpointName) -> None:
        """The request is sent to another endpoint instead."""
        ...

    def refused(self, error: BaseException) -> None:
        """It goes nowhere."""
        ...

    def finished(self, endpoint: EndpointName, outcome: Outcome) -> None: ...

    def headers(self) -> Mapping[str, str]:
        """Return the headers that tell the engine of the trace."""
        ...


class Untraced:
    """A request of which no trace tells: traces are off, or this one was not drawn."""

    def __init__(self, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self._headers = headers

    def step(self, name: str) -> None: ...

    def decided(self, decision: Decision) -> None: ...

    def moved(self, endpoint: EndpointName) -> None: ...

    def refused(self, error: BaseException) -> None: ...

    def finished(self, endpoint: EndpointName, outcome: Outcome) -> None: ...

    def headers(self) -> Mapping[str, str]:
        return self._headers


UNTRACED = Untraced()


def begin(traces: Traces | None, path: str, headers: Mapping[str, str]) -> RequestSpan:
    """Return the span of a request that arrived. ``traces`` None: they are off."""
    if traces is None:
        return UNTRACED
    span = traces.begin(NAME, headers)
    context = traces.context_of(span)
    if TRACESTATE in headers:  # one that belongs to no valid traceparent must not go on with ours
        context.setdefault(TRACESTATE, "")
    return Traced(span, path, context) if span.is_recording() else Untraced(context)


class Traced:
    """A request with a span of its own."""

    def __init__(self, span: Span, path: str, context: Mapping[str, str]) -> None:
        self._span = span
        self._span.set_attribute("url.path", path[:PATH_MAX])
        self._context = context
        self._retries = 0

    def step(self, name: str) -> None:
        self._span.add_event(name)

    def decided(self, decision: Decision) -> None:
        request, target = decision.request, decision.target
        match = match_at(decision, decision.computes_prompt.name)
        told: dict[str, Attribute] = {
            "gen_ai.request.model": request.model,
            "server.address": target.address,
            "server.port": target.port,
            "kvatlas.request_id": request.id,
            "kvatlas.endpoint": target.name,
            "kvatlas.prefill_endpoint": None if decision.prefill is None else decision.prefill.name,
            "kvatlas.prompt_tokens": request.prompt_tokens,
            "kvatlas.matched_tokens": match.tokens,
            "kvatlas.matched_by": match.matched_by,
            "kvatlas.predicted_cached_tokens": decision.predicted_cached_tokens,
            "kvatlas.why": why(decision),
        }
        self._tell(told)
        self.step("decide")

    def moved(self, endpoint: EndpointName) -> None:
        self._retries += 1
        self._span.add_event("retry", {"kvatlas.endpoint": endpoint})

    def refused(self, error: BaseException) -> None:
        from opentelemetry.trace import StatusCode

        if isinstance(error, asyncio.CancelledError):
            self._tell({"kvatlas.end": End.CLIENT_GONE.value})
        else:
            known = isinstance(error, RequestError | RouteError)
            reason = error.reason if isinstance(error, RouteError) else None
            self._tell({"kvatlas.end": "not_sent", "kvatlas.dropped_reason": reason, "error.type": type(error).__name__})
            self._span.set_status(StatusCode.ERROR, str(error) if known else None)
        self._span.end()

    def finished(self, endpoint: EndpointName, outcome: Outcome) -> None:
        from opentelemetry.trace import StatusCode

        told = {
            "gen_ai.usage.input_tokens": outcome.prompt_tokens,
            "gen_ai.usage.output_tokens": outcome.output_tokens,
            "kvatlas.endpoint": endpoint,
            "kvatlas.cached_tokens": outcome.cached_tokens,
            "kvatlas.ttft_s": outcome.ttft_s,
            "kvatlas.end": outcome.end.value,
            "kvatlas.retries": self._retries,
        }
        self._tell(told)
        if outcome.end in _FAILED:
            self._span.set_status(StatusCode.ERROR, outcome.end.value)
        self._span.end()

    def headers(self) -> Mapping[str, str]:
        return self._context

    def _tell(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
