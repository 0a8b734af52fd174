"""Publishes frames as engines do, from one socket a pod; waits where a real publisher would drop, so that none is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import zmq

from benchmarks.sides.process import Placement
from benchmarks.streams import CHAIN_BLOCKS, Chain, Fleet

SENTINEL = Chain(9_999_999, 1)
"""A block that every pod stores last: when a query finds it on all pods, all frames were applied."""


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

    def publish(self, frames: Sequence[tuple[int, bytes]]) -> None:
        for pod, payload in frames:
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


def frames(fleet: Fleet, blocks_per_event: int) -> list[tuple[int, bytes]]:
    """Return a fleet's payloads, pods in turn, and a sentinel of each pod at the end."""
    by_pod: dict[int, list[bytes]] = {pod: [] for pod in range(fleet.pods)}
    for part in fleet.parts():
        assert part.blocks == CHAIN_BLOCKS
        by_pod[part.pod].extend(Chain(part.chain).stored(blocks_per_event))
    longest = max(len(payloads) for payloads in by_pod.values())
    turns = [
        (pod, payload)
        for first in range(0, longest, 32)
        for pod, payloads in by_pod.items()
        for payload in payloads[first : first + 32]
    ]
    (sentinel,) = SENTINEL.stored(1)
    return turns + [(pod, sentinel) for pod in by_pod]
