"""Routers that tell each other what they do: each knows what all have in flight, whatever is lost and whoever dies."""

from __future__ import annotations

import random
from array import array
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.discovery.endpoints import pool_from_urls
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.load import InFlight
from kvatlas.route.outcome import End, Outcome
from kvatlas.route.picker_config import build_router, read_config
from kvatlas.route.request import RouteRequest
from kvatlas.route.router import Flight
from kvatlas.route.sharing import outbox as outbox_module
from kvatlas.route.sharing.messages import EndpointLoad, Told, decode, unpack
from kvatlas.route.sharing.outbox import Outbox
from kvatlas.route.sharing.peers import PEERS_MAX, Peers

POOL = pool_from_urls(["http://10.0.0.1:8000", "http://10.0.0.2:8000"]).endpoints
NAMES = [endpoint.name for endpoint in POOL]
SILENCE_S = 5.0
PICKER = """
plugins: [{type: approx-prefix-cache-producer}, {type: prefix-cache-scorer}, {type: active-request-scorer}]
schedulingProfiles:
- {name: default, plugins: [{pluginRef: prefix-cache-scorer, weight: 3}, {pluginRef: active-request-scorer}]}
"""
DONE = Outcome(end=End.DONE)


class Node:
    """A router with all that tells and hears, and its flights."""

    def __init__(self, number: int) -> None:
        self.now_s = 0.0
        self.router = build_router(read_config(PICKER), clock=lambda: self.now_s, random=random.Random(number))
        self.router.set_endpoints(POOL)
        self.outbox = Outbox(number, self.router.own_in_flight)
        self.router.keep_journal(self.outbox)
        self.peers = Peers(number, SILENCE_S, self.router.knows)
        self.flights: list[Flight] = []

    def decide(self, tokens: int = 640, start: int = 0) -> Flight:
        request = RouteRequest(id=f"{len(self.flights)}", model="m", token_ids=array("I", range(start, start + tokens)))
        self.flights.append(self.router.decide(request))
        return self.flights[-1]

    def hear(self, message: bytes) -> None:
        told = decode(message)
        loads = self.peers.heard(told, self.now_s)
        if loads is None:
            return
        self.router.others_in_flight(loads)
        for route in told.routes:
            endpoints = [EndpointName(name) for name in route.endpoints]
            self.router.sent_elsewhere(route.plugin, route.kind, endpoints, unpack(route.chain))

    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        self.router.others_in_flight(self.peers.forget_silent(self.now_s))

    def seen(self) -> dict[str, InFlight]:
        return {name: self.router.load(name).in_flight for name in NAMES}


def told(node: Node) -> bytes:
    message = node.outbox.changes()
    assert message is not None
    return message


def nothing() -> dict[str, InFlight]:
    return {name: InFlight() for name in NAMES}


def test_what_one_router_has_in_flight_counts_for_the_other_until_it_ends() -> None:
    a, b = Node(1), Node(2)
    flight = a.decide(tokens=640)
    b.hear(told(a))
    at = flight.decision.target.name
    assert b.seen()[at] == InFlight(1, 640, 1, 640, 640 * 640 // 2)
    flight.first_token(0.1)
    b.hear(told(a))
    assert b.seen()[at] == InFlight(1, 640, 0, 0)
    flight.finished(DONE)
    b.hear(told(a))
    assert b.seen() == a.seen() == nothing()


def test_own_and_others_add_up_and_only_the_own_is_told_on() -> None:
    a, b = Node(1), Node(2)
    first = a.decide()
    b.hear(told(a))
    second = b.decide()
    assert first.decision.target.name == second.decision.target.name, "the prefix is there"
    (load,) = decode(told(b)).loads
    assert (load.requests, b.seen()[second.endpoint].requests) == (1, 2)


def test_a_prompt_that_another_router_sent_is_history() -> None:
    a, b = Node(1), Node(2)
    sent = a.decide(tokens=640)
    b.hear(told(a))
    found = b.decide(tokens=640).decision
    assert found.target == sent.decision.target
    assert found.matches["approx-prefix-cache-producer"].of(found.target.name).tokens == 640


def test_a_router_that_falls_silent_has_nothing_in_flight() -> None:
    a, b = Node(1), Node(2)
    a.decide()
    b.hear(told(a))
    b.tick(SILENCE_S)
    assert b.seen() != nothing()
    b.tick(0.1)
    assert b.seen() == nothing()
    assert len(b.peers) == 0


def test_a_loss_is_counted_and_set_right_by_the_next_complete_message() -> None:
    a, b = Node(1), Node(2)
    flight = a.decide()
    b.hear(told(a))
    flight.finished(DONE)
    told(a)  # lost
    assert b.seen() != nothing()
    b.hear(a.outbox.everything())
    assert b.seen() == nothing()
    assert b.peers.lost == 1


def test_an_echo_and_an_old_message_change_nothing() -> None:
    a, b = Node(1), Node(2)
    flight = a.decide()
    first = told(a)
    a.hear(first)
    assert a.seen()[flight.endpoint].requests == 1
    flight.finished(DONE)
    b.hear(told(a))
    b.hear(first)
    assert b.seen() == nothing()


def test_endpoints_that_are_not_in_the_pool_are_left_aside() -> None:
    b = Node(2)
    assert b.peers.heard(Told(1, 0, True, (EndpointLoad("default/elsewhere", 1, 1, 1, 1, 1),)), 0.0) == {}
    b.router.sent_elsewhere("approx-prefix-cache-producer", "history", [EndpointName("default/elsewhere")], (1, 2))
    b.router.sent_elsewhere("no-such-plugin", "history", NAMES, (1, 2))
    b.router.sent_elsewhere("approx-prefix-cache-producer", "no such kind", NAMES, (1, 2))
    assert b.seen() == nothing()


def test_there_are_only_so_many_peers() -> None:
    peers = Peers(0, SILENCE_S, lambda _name: True)
    for number in range(1, PEERS_MAX + 1):
        assert peers.heard(Told(number, 0, True), 0.0) is not None
    assert peers.heard(Told(PEERS_MAX + 1, 0, True), 0.0) is None
    peers.forget_silent(SILENCE_S + 1)
    assert peers.heard(Told(PEERS_MAX + 1, 1, True), SILENCE_S + 1) is not None


def test_where_nothing_happened_there_is_nothing_to_tell_and_everything_is_empty() -> None:
    a = Node(1)
    assert a.outbox.changes() is None
    assert decode(a.outbox.everything()).loads == ()


def test_prompts_beyond_the_bound_are_not_told_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "WAITING_BYTES_MAX", 100)
    a = Node(1)
    for start in range(5):
        a.decide(tokens=640, start=start * 1000)
    message = decode(told(a))
    assert (len(message.routes), a.outbox.not_told) == (2, 3)
    assert sum(load.requests for load in message.loads) == 5


class Net:
    """Three routers, and what is on its way between any two."""

    def __init__(self) -> None:
        self.alive = {number: Node(number) for number in (1, 2, 3)}
        self.born = 3
        self.on_way: dict[tuple[int, int], deque[bytes]] = {}

    def send(self, sender: int, message: bytes | None) -> None:
        for receiver in self.alive if message is not None else ():
            if receiver != sender:
                self.on_way.setdefault((sender, receiver), deque()).append(message)

    def deliver(self) -> None:
        for (_, receiver), messages in self.on_way.items():
            while messages:
                message = messages.popleft()
                if receiver in self.alive:
                    self.alive[receiver].hear(message)

    def step(self, what: str, which: int, lost: bool) -> None:
        number = sorted(self.alive)[which % len(self.alive)]
        node = self.alive[number]
        open_flights = [flight for flight in node.flights if not flight.ended]
        match what:
            case "decide":
                node.decide(start=which)
            case "token" if open_flights:
                open_flights[which % len(open_flights)].first_token(0.1)
            case "move" if open_flights:
                open_flights[which % len(open_flights)].moved(NAMES[which % 2])
            case "finish" if open_flights:
                open_flights[which % len(open_flights)].finished(DONE)
            case "tell":
                self.send(number, node.outbox.changes())
            case "beat":
                self.send(number, node.outbox.everything())
            case "arrive" if self.on_way:
                route = sorted(self.on_way)[which % len(self.on_way)]
                if self.on_way[route]:
                    message = self.on_way[route].popleft()
                    if not lost and route[1] in self.alive:
                        self.alive[route[1]].hear(message)
            case "die":
                del self.alive[number]
                self.born += 1
                self.alive[self.born] = Node(self.born)

    def beat(self) -> None:
        for number, node in self.alive.items():
            self.send(number, node.outbox.everything())
        self.deliver()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["decide", "decide", "token", "move", "finish", "tell", "beat", "arrive", "arrive", "die"]),
        st.integers(0, 50),
        st.booleans(),
    ),
    max_size=60,
)


@given(STEPS)
@settings(deadline=None, max_examples=50)
def test_after_any_losses_and_deaths_a_beat_and_the_silence_set_everybody_right(steps: list[tuple[str, int, bool]]) -> None:
    net = Net()
    for what, which, lost in steps:
        net.step(what, which, lost)
    net.deliver()
    for node in net.alive.values():
        node.tick(SILENCE_S + 1)
    net.beat()
    own = [{name: node.router.own_in_flight(name) for name in NAMES} for node in net.alive.values()]
    for node in net.alive.values():
        for name in NAMES:
            assert node.seen()[name].requests == sum(one[name].requests for one in own)
            assert node.seen()[name].prefill_tokens == sum(one[name].prefill_tokens for one in own)


@given(STEPS)
@settings(deadline=None, max_examples=50)
def test_when_all_requests_have_ended_and_all_is_said_or_silent_nothing_is_left(steps: list[tuple[str, int, bool]]) -> None:
    net = Net()
    for what, which, lost in steps:
        net.step(what, which, lost)
    net.deliver()
    for node in net.alive.values():
        for flight in node.flights:
            flight.finished(DONE)
    for node in net.alive.values():
        node.tick(SILENCE_S + 1)
    assert all(node.seen() == nothing() for node in net.alive.values())
