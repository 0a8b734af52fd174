"""Routes that show the router: its decisions, and whom it can send to."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from fastapi import Request
from fastapi.responses import Response

from kvatlas.errors import RequestError
from kvatlas.route.decision import Decision
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.log import Logged
from kvatlas.route.router import Router
from kvatlas.serve.body import read_bytes
from kvatlas.serve.faults import JSON
from kvatlas.serve.queries import known_parameters
from kvatlas.serve.routing.asked import CHAT, COMPLETION
from kvatlas.serve.routing.explain import DecisionsAnswer, endpoints_shown, shown
from kvatlas.serve.schema import read_body
from kvatlas.serve.workers.worker import Worker

DECISIONS_DEFAULT = 20
DECISIONS_MAX = 1_000
NAMES_SHOWN = 8


class RoutingRoutes:
    """One method a route. Docstrings are shown in the API's documentation."""

    def __init__(
        self,
        router: Router,
        health: Callable[[EndpointName], str],
        worker: Worker | None,
        preview: Callable[[str, bytes], Awaitable[Decision]],
        body_bytes_max: int,
    ) -> None:
        """``health``: an endpoint's state; ``worker``: which of several processes this is: each knows its own decisions.

        ``preview``: where a request of this path and body would go.
        """
        self._router = router
        self._health = health
        self._worker = worker
        self._decide = preview
        self._body_bytes_max = body_bytes_max
        self._headers = {} if worker is None else worker.headers

    async def decisions(self, request: Request) -> Response:
        """Show the last decisions, newest first: who could have had each request, what each held and scored, how it went."""
        known_parameters(request.query_params, frozenset({"id", "endpoint", "limit", "candidates"}))
        limit = _number(request.query_params, "limit", DECISIONS_MAX) or DECISIONS_DEFAULT
        candidates_max = _number(request.query_params, "candidates", DECISIONS_MAX)
        endpoint = request.query_params.get("endpoint")
        wanted = request.query_params.get("id")
        if wanted is not None:
            logged = self._router.log.get(wanted)
            if logged is None:
                remedy = "the last ones are (route.decisionsKept); see /v1/decisions"
                if self._worker is not None:
                    remedy += f". This is worker {self._worker}; others, at the next ports, have decisions of their own"
                raise RequestError("id", f"no decision for {wanted!r:.80} is kept", remedy)
            found = [logged]
        else:
            found = self._router.log.last(DECISIONS_MAX)
        chosen = [one for one in found if endpoint in (None, one.decision.target.name, one.decision.target.authority)]
        if endpoint is not None and not chosen:
            self._check_known(endpoint)
        return self._json(DecisionsAnswer(tuple(shown(one, candidates_max) for one in chosen[:limit])))

    async def endpoints(self, request: Request) -> Response:
        """Show everyone a request could be sent to, and how busy they are."""
        known_parameters(request.query_params, frozenset())
        return self._json(endpoints_shown(self._router, self._health, time.monotonic()))

    async def preview(self, request: Request) -> Response:
        """Show where a chat completion or completion request would go now, and why. It is not sent, and counts nowhere."""
        known_parameters(request.query_params, frozenset({"candidates"}))
        candidates_max = _number(request.query_params, "candidates", DECISIONS_MAX)
        body = await read_bytes(request, self._body_bytes_max)
        decision = await self._decide(COMPLETION if read_body(body, _Form).messages is msgspec.UNSET else CHAT, body)
        estimated = decision.request.token_ids is None or not decision.request.tokens_complete
        return self._json(DecisionsAnswer((shown(Logged(decision, estimated=estimated), candidates_max),)))

    def _check_known(self, endpoint: str) -> None:
        pool = self._router.endpoints
        if not any(endpoint in (one.name, one.authority) for one in pool):
            names = ", ".join(sorted(one.name for one in pool)[:NAMES_SHOWN])
            remedy = f"one of /v1/endpoints: {names}" if names else "no endpoint is there: see discovery's log lines"
            raise RequestError("endpoint", f"no endpoint is called {endpoint!r:.80}", remedy)

    def _json(self, answer: msgspec.Struct) -> Response:
        return Response(msgspec.json.encode(answer), headers=self._headers, media_type=JSON)


class _Form(msgspec.Struct, frozen=True):
    """Which kind of request a body is."""

    messages: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _number(parameters: Mapping[str, str], name: str, most: int) -> int | None:
    text = parameters.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= most):
        raise RequestError(name, f"{text!r:.40} is no such number", f"1 to {most}")
    return int(text)
