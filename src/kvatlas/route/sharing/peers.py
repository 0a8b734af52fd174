"""What other routers said that they have in flight, until they say otherwise, or nothing for too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from kvatlas.route.endpoint import EndpointName
from kvatlas.route.load import InFlight
from kvatlas.route.sharing.messages import Told

PEERS_MAX = 256
"""Routers that are listened to; what further ones say is left aside."""

Loads = dict[EndpointName, InFlight]
"""What all others together have in flight, of endpoints where that may have changed."""


class Peers:
    """Everybody else. Bounded by PEERS_MAX and the endpoints of this router's own pool."""

    def __init__(self, ours: int, silence_s: float, known: Callable[[EndpointName], bool]) -> None:
        """``ours``: this router's own number; ``known``: whether an endpoint is in the pool."""
        self._ours = ours
        self._silence_s = silence_s
        self._known = known
        self._peers: dict[int, _Peer] = {}
        self.lost = 0
        """Messages that did not come, by the gaps that they left."""

    def __len__(self) -> int:
        return len(self._peers)

    def heard(self, told: Told, now_s: float) -> Loads | None:
        """Note what a router said. None: it is not to be listened to (our own echo, an old message, one router too many)."""
        if told.router == self._ours:
            return None
        peer = self._peers.get(told.router)
        if peer is None:
            if len(self._peers) >= PEERS_MAX:
                return None
            peer = self._peers[told.router] = _Peer()
        elif told.number <= peer.number:
            return None
        else:
            self.lost += told.number - peer.number - 1
        peer.number, peer.heard_s = told.number, now_s
        changed: set[EndpointName] = set()
        if told.complete:
            changed.update(peer.loads)
            peer.loads = {}
        for load in told.loads:
            name = EndpointName(load.endpoint)
            if self._known(name):
                changed.add(name)
                peer.loads[name] = InFlight(
                    load.requests, load.tokens, load.prefill_requests, load.prefill_tokens, load.prefill_pairs
                )
        return self._totals(changed)

    def forget_silent(self, now_s: float) -> Loads:
        """Drop routers that said nothing for longer than the silence allowed: they have nothing in flight any more."""
        silent = [number for number, peer in self._peers.items() if now_s - peer.heard_s > self._silence_s]
        changed = {name for number in silent for name in self._peers.pop(number).loads}
        return self._totals(changed)

    def _totals(self, endpoints: Iterable[EndpointName]) -> Loads:
        totals = {}
        for name in endpoints:
            told = [peer.loads[name] for peer in self._peers.values() if name in peer.loads]
            totals[name] = InFlight(
                sum(one.requests for one in told),
                sum(one.tokens for one in told),
                sum(one.prefill_requests for one in told),
                sum(one.prefill_tokens for one in told),
                sum(one.prefill_pairs for one in told),
            )
        return totals


class _Peer:
    """One other router."""

    __slots__ = ("heard_s", "loads", "number")

    def __init__(self) -> None:
        self.number = -1
        self.heard_s = 0.0
        self.loads: dict[EndpointName, InFlight] = {}
