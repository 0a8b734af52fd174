"""What is to be told to other routers: collected as it happens, told together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvatlas.route.endpoint import EndpointName
from kvatlas.route.load import InFlight
from kvatlas.route.sharing.messages import LOADS_MAX, ROUTES_MAX, EndpointLoad, Route, Told, encode, pack

WAITING_BYTES_MAX = 1 << 20
"""Of prompts that wait to be told; further ones are not told."""

_NOTHING = InFlight()


class Outbox:
    """A router's journal, and what is told of it. Not thread-safe: the router's decisions and messages are of one thread."""

    def __init__(
        self, router: int, in_flight: Callable[[EndpointName], InFlight], wake: Callable[[], None] = lambda: None
    ) -> None:
        """``in_flight``: what this router itself has at an endpoint; ``wake``: called when there is something to tell."""
        self._router = router
        self._in_flight = in_flight
        self._wake = wake
        self._number = 0
        self._changed: set[EndpointName] = set()
        self._busy: set[EndpointName] = set()
        """Those of which something in flight was told."""
        self._routes: list[Route] = []
        self._waiting_bytes = 0
        self.not_told = 0
        """Prompts that were left out because too much waited."""

    def in_flight_changed(self, endpoint: EndpointName) -> None:
        self._changed.add(endpoint)
        self._wake()

    def sent(self, plugin: str, kind: str, endpoints: Sequence[EndpointName], chain: Sequence[int]) -> None:
        if len(self._routes) >= ROUTES_MAX or self._waiting_bytes >= WAITING_BYTES_MAX:
            self.not_told += 1
            return
        route = Route(plugin, kind, tuple(endpoints), pack(chain))
        self._waiting_bytes += len(route.chain)
        self._routes.append(route)
        self._wake()

    def changes(self) -> bytes | None:
        """Return a message of what changed since the last one; None where nothing did."""
        if not self._changed and not self._routes:
            return None
        return self._message(self._changed, complete=False)

    def everything(self) -> bytes:
        """Return a message of all that is in flight: it sets others right, whatever they missed."""
        return self._message(self._busy | self._changed, complete=True)

    def _message(self, endpoints: set[EndpointName], *, complete: bool) -> bytes:
        loads = []
        for endpoint in endpoints:
            flying = self._in_flight(endpoint)
            if flying != _NOTHING:
                self._busy.add(endpoint)
            else:
                self._busy.discard(endpoint)
                if complete:
                    continue
            prefill = flying.prefill_requests, flying.prefill_tokens, flying.prefill_pairs
            loads.append(EndpointLoad(endpoint, flying.requests, flying.tokens, *prefill))
        told = Told(self._router, self._number, complete, tuple(loads[:LOADS_MAX]), tuple(self._routes))
        self._number += 1
        self._changed = set()
        self._routes = []
        self._waiting_bytes = 0
        return encode(told)
