"""Publishes frames as engines do, from one socket a pod; waits where a real publisher would drop, so that none is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import zmq

from benchmarks.sides.process import Placement
from benchmarks.streams import CHAIN_BLOCKS, Chain, Fleet

_TURN_FRAMES = 32
_FIRST_SENTINEL = 9_000_000


class Frames(NamedTuple):
    """What pods publish: (pod, payload) in order. ``sentinel`` is a block that every pod stores last.

    When a query finds the sentinel on all pods, all frames were applied.
    """

    sent: list[tuple[int, bytes]]
    sentinel: Chain


class Publisher:
    """One XPUB socket a pod: a PUB socket that tells of subscriptions, and can be told to wait for slow readers."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], pods: int) -> None:
        self._sockets = []
        self._next = [0] * pods
        self.endpoints = []
        for _ in range(pods):
            socket = context.socket(zmq.XPUB)
            socket.setsockopt(zmq.XPUB_NODROP, 1)
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            self._sockets.append(socket)
            self.endpoints.append(f"tcp://127.0.0.1:{port}")

    def wait(self, timeout_s: float = 30.0) -> None:
        """Return when every socket has a subscriber."""
        for socket in self._sockets:
            if not socket.poll(int(timeout_s * 1000)):
                raise TimeoutError("no subscription came")
            socket.recv()

    def publish(self, frames: Frames) -> None:
        for pod, payload in frames.sent:
            number = self._next[pod]
            self._next[pod] = number + 1
            self._sockets[pod].send_multipart((b"%d" % pod, number.to_bytes(8, "big"), payload))

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(linger=0)


@contextmanager
def publisher(pods: int, place: Placement) -> Iterator[Publisher]:
    """Publish from the feeding core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {place.feeding})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 2 * pods + 16)
    try:
        opened = Publisher(context, pods)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        context.term()
        os.sched_setaffinity(0, allowed)


def stored_frames(fleet: Fleet, blocks_per_event: int) -> Frames:
    """Return the frames that store all that a fleet holds, pods in turn."""
    return _in_turns(fleet, lambda chain: chain.stored(blocks_per_event), Chain(_FIRST_SENTINEL, 1))


def removed_frames(fleet: Fleet) -> Frames:
    """Return the frames that remove it again, as vLLM does: one hash an event, 64 events a frame."""
    return _in_turns(fleet, lambda chain: chain.removed(), Chain(_FIRST_SENTINEL + 1, 1))


def _in_turns(fleet: Fleet, payloads_of: Callable[[Chain], Iterable[bytes]], sentinel: Chain) -> Frames:
    by_pod: dict[int, list[bytes]] = {pod: [] for pod in range(fleet.pods)}
    for part in fleet.parts():
        assert part.blocks == CHAIN_BLOCKS
        by_pod[part.pod].extend(payloads_of(Chain(part.chain)))
    longest = max(len(payloads) for payloads in by_pod.values())
    sent = [
        (pod, payload)
        for first in range(0, longest, _TURN_FRAMES)
        for pod, payloads in by_pod.items()
        for payload in payloads[first : first + _TURN_FRAMES]
    ]
    (last,) = sentinel.stored(1)
    return Frames(sent + [(pod, last) for pod in by_pod], sentinel)
