"""Several routers in front of the same engines send a prefix where it is about as often as one router would."""

from __future__ import annotations

import random
from array import array
from collections import deque

from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Flight, Router
from kvatlas.route.sharing.messages import decode, unpack
from kvatlas.route.sharing.outbox import Outbox
from kvatlas.route.sharing.peers import Peers
from kvatlas.serve.routing.picker import OURS

ENGINES, PREFIXES, TURNS, IN_FLIGHT = 8, 100, 10, 32
SEED = 1
HIT_S, MISS_S = 0.05, 0.2


def hit_ratio(count: int, *, share: bool) -> float:
    """Return the share of requests that go to an engine which had their prefix before; any router gets any request."""
    chance = random.Random(SEED)
    clock = [0.0]
    routers = [build_router(read_config(OURS), clock=lambda: clock[0], random=random.Random(number)) for number in range(count)]
    outboxes = [Outbox(number, router.own_in_flight) for number, router in enumerate(routers)]
    peers = [Peers(number, 5.0, router.knows) for number, router in enumerate(routers)]
    for router, outbox in zip(routers, outboxes, strict=True):
        router.set_endpoints(pool_from_urls([f"http://10.0.0.{number}:8000" for number in range(ENGINES)]).endpoints)
        router.keep_journal(outbox)

    def tell() -> None:
        for outbox in outboxes:
            message = outbox.changes()
            for router, known in zip(routers, peers, strict=True) if message is not None else ():
                hear(router, known, message, clock[0])

    held: set[tuple[int, str]] = set()
    flights: deque[tuple[Flight, float]] = deque()
    order = [prefix for prefix in range(PREFIXES) for _ in range(TURNS)]
    chance.shuffle(order)
    hits = 0
    for number, prefix in enumerate(order):
        clock[0] += 0.01
        tokens = array("I", range(prefix * 1000, prefix * 1000 + 800))
        flight = chance.choice(routers).decide(RouteRequest(id=str(number), model="m", token_ids=tokens))
        hit = (prefix, flight.endpoint) in held
        hits += hit
        held.add((prefix, flight.endpoint))
        flights.append((flight, HIT_S if hit else MISS_S))
        if len(flights) > IN_FLIGHT:
            ended, ttft_s = flights.popleft()
            ended.finished(Outcome(end=End.DONE, ttft_s=ttft_s, duration_s=0.3, prompt_tokens=800))
        if share:
            tell()
    return hits / len(order)


def hear(router: Router, peers: Peers, message: bytes, now_s: float) -> None:
    told = decode(message)
    loads = peers.heard(told, now_s)
    if loads is None:  # its own
        return
    router.others_in_flight(loads)
    for route in told.routes:
        router.sent_elsewhere(route.plugin, route.kind, [EndpointName(name) for name in route.endpoints], unpack(route.chain))


def test_routers_that_tell_each_other_hit_about_as_often_as_one_and_those_that_do_not_far_less() -> None:
    one, alone, sharing = hit_ratio(1, share=False), hit_ratio(4, share=False), hit_ratio(4, share=True)
    assert sharing > one - 0.05
    assert sharing > alone + 0.1
