"""Routers that tell each other what they do, over ZeroMQ: each publishes at addresses of its own, and listens to its peers'.

Nothing waits for a peer: what can't be sent or was lost is set right by the next complete message (``BEAT_S``).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import socket
import time
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio
import zmq.utils.z85
from prometheus_client import CollectorRegistry, Counter, Gauge

from kvatlas.config.route import RouteSettings
from kvatlas.errors import ConfigError, DecodeError
from kvatlas.netloc import netloc
from kvatlas.observe.logs import get_logger
from kvatlas.route.endpoint import EndpointName
from kvatlas.route.router import Router
from kvatlas.route.sharing.messages import MESSAGE_BYTES_MAX, decode, unpack
from kvatlas.route.sharing.outbox import Outbox
from kvatlas.route.sharing.peers import Peers

BEAT_S = 1.0
"""How often everything is told."""
PAUSE_S = 0.005
"""Between two messages of what changed, at least: what happens meanwhile is told together."""
HEARD_PER_S_MAX = 800
"""Messages of all peers together: the more there are, the longer everyone's pause."""
RESOLVE_S = 10.0
"""How often names of peers are looked up again: replicas come and go behind one."""
ADDRESSES_MAX = 256
"""Peers that are connected to."""
WAITING_MAX = 1_000
"""Messages that wait in a socket; beyond it they are lost."""
LINGER_MS = 100
AT_ONCE_MAX = 64
"""Messages read before requests get their turn."""

_log = get_logger(__name__)


class Sharing:
    """Tells peers what a router does, and the router what they do. Of the event loop that the router decides in."""

    def __init__(
        self, router: Router, settings: RouteSettings, registry: CollectorRegistry, told: Callable[[], None] = lambda: None
    ) -> None:
        """``told``: called when what others have in flight changed."""
        self._router = router
        self._settings = settings
        self._told = told
        self._metrics = SharingMetrics(registry)
        number = secrets.randbits(63)
        self._outbox = Outbox(number, router.own_in_flight, self._wake)
        self._peers = Peers(number, settings.peers_silence, router.knows)
        self._sockets: _Sockets | None = None
        self._connected: set[str] = set()
        self._pending: asyncio.TimerHandle | None = None
        self._sent_s = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to tell and to listen. Raises ConfigError where an address can't be had."""
        self._sockets = _Sockets(self._settings)
        self._router.keep_journal(self._outbox)
        running = (self._listen(self._sockets), self._beat(), self._find(self._sockets))
        self._tasks = [asyncio.create_task(one) for one in running]

    async def close(self) -> None:
        """Tell a last time, and end."""
        if self._pending is not None:
            self._pending.cancel()
        if self._sockets is None:
            return
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._send(self._outbox.everything())
        sockets, self._sockets = self._sockets, None
        await asyncio.to_thread(sockets.close)

    # -- out ------------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Tell soon: at once after a pause, else when the pause is over."""
        if self._pending is None:
            pause_s = max(PAUSE_S, len(self._peers) / HEARD_PER_S_MAX)
            wait_s = max(0.0, self._sent_s + pause_s - time.monotonic())
            self._pending = asyncio.get_running_loop().call_later(wait_s, self._tell_changes)

    def _tell_changes(self) -> None:
        self._pending = None
        message = self._outbox.changes()
        if message is not None:
            self._send(message)

    def _send(self, message: bytes) -> None:
        self._sent_s = time.monotonic()
        if self._sockets is None:
            return
        with contextlib.suppress(zmq.Again):
            self._sockets.out.send(message, zmq.NOBLOCK)
        self._metrics.sent(len(message), self._outbox.not_told)

    async def _beat(self) -> None:
        while True:
            self._send(self._outbox.everything())
            self._router.others_in_flight(self._peers.forget_silent(time.monotonic()))
            self._metrics.peers.set(len(self._peers))
            await asyncio.sleep(BEAT_S)

    # -- in -------------------------------------------------------------------------------------------------------------

    async def _listen(self, sockets: _Sockets) -> None:
        while True:
            self._hear(await sockets.listening.recv())
            with contextlib.suppress(zmq.Again):
                for _ in range(AT_ONCE_MAX):
                    self._hear(sockets.ready.recv(zmq.NOBLOCK))
            self._told()
            await asyncio.sleep(0)

    def _hear(self, message: bytes) -> None:
        try:
            told = decode(message)
        except DecodeError as error:
            self._metrics.refused(error)
            return
        loads = self._peers.heard(told, time.monotonic())
        if loads is None:
            return
        self._router.others_in_flight(loads)
        for route in told.routes:
            endpoints = [EndpointName(name) for name in route.endpoints]
            self._router.sent_elsewhere(route.plugin, route.kind, endpoints, unpack(route.chain))
        self._metrics.heard(self._peers.lost)

    async def _find(self, sockets: _Sockets) -> None:
        """Connect to all addresses behind peers' names, and leave those that are there no more."""
        while True:
            found: set[str] = set()
            for peer in self._settings.peers:
                found.update(await self._addresses(peer))
            for gone in self._connected - found:
                sockets.listening.disconnect(gone)
            for new in sorted(found - self._connected)[: ADDRESSES_MAX - len(self._connected & found)]:
                sockets.listening.connect(new)
            if found != self._connected:
                _log.info("peers", count=len(found), addresses=sorted(found)[:16])
            self._connected = found
            await asyncio.sleep(RESOLVE_S)

    async def _addresses(self, peer: str) -> Sequence[str]:
        scheme, _, rest = peer.partition("://")
        if scheme != "tcp":
            return (peer,)
        host, _, port = rest.rpartition(":")
        try:
            answers = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
        except OSError as error:
            _log.warning("a peer's name is not known", peer=peer, error=str(error))
            return [one for one in self._connected if one.endswith(f":{port}")]  # rather those of before than none
        hosts = {str(answer[4][0]) for answer in answers}
        return [f"tcp://{netloc(one, int(port))}" for one in hosts]


class _Sockets:
    """What is told goes out of one, what is heard comes in at the other."""

    def __init__(self, settings: RouteSettings) -> None:
        """Raises ConfigError where an address can't be had."""
        self._context = zmq.asyncio.Context()
        self.out: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUB)  # publishing never waits
        self.listening: zmq.asyncio.Socket = self._context.socket(zmq.SUB)
        self.ready: zmq.Socket[bytes] = zmq.Socket(shadow=self.listening.underlying)
        """The same, for what is there already."""
        for one in (self.out, self.listening):
            one.set(zmq.IPV6, 1)
            one.set(zmq.SNDHWM, WAITING_MAX)
            one.set(zmq.RCVHWM, WAITING_MAX)
            one.set(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
            one.set(zmq.HEARTBEAT_IVL, 1000)
            one.set(zmq.HEARTBEAT_TIMEOUT, 5000)
        self.listening.set(zmq.RECONNECT_IVL, 100)
        self.listening.set(zmq.RECONNECT_IVL_MAX, 2000)
        self.listening.set(zmq.SUBSCRIBE, b"")
        if settings.peers_token is not None:
            _encrypt(self.out, self.listening, settings.peers_token)
        for address in settings.peers_listen:
            try:
                self.out.bind(address)
            except zmq.ZMQError as error:
                self.close()
                problem = f"cannot listen on {address}: {error}"
                raise ConfigError("route.peersListen", problem, "a free address of this machine") from None

    def close(self) -> None:
        """Close both; what was sent last gets a moment to leave."""
        self.listening.close(linger=0)
        self.out.close(linger=LINGER_MS)
        self._context.term()


class SharingMetrics:
    """What an operator sees of it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.peers = Gauge("kvatlas_route_peers", "Routers that tell this one what they do.", registry=registry)
        self._messages = Counter(
            "kvatlas_route_peer_messages",
            "Messages between routers, by what became of them: sent, heard, lost, and refused by reason.",
            ("outcome",),
            registry=registry,
        )
        self._bytes = Counter("kvatlas_route_peer_sent_bytes", "Bytes of messages to other routers.", registry=registry)
        self._not_told = Counter(
            "kvatlas_route_peer_prompts_not_told", "Prompts not told to others: too much waited.", registry=registry
        )
        self._lost_before = self._not_told_before = 0
        self._sent, self._heard, self._lost = (self._messages.labels(one) for one in ("sent", "heard", "lost"))

    def sent(self, length_bytes: int, not_told: int) -> None:
        self._sent.inc()
        self._bytes.inc(length_bytes)
        self._not_told.inc(not_told - self._not_told_before)
        self._not_told_before = not_told

    def heard(self, lost: int) -> None:
        self._heard.inc()
        self._lost.inc(lost - self._lost_before)
        self._lost_before = lost

    def refused(self, error: DecodeError) -> None:
        self._messages.labels(f"refused_{error.reason}").inc()


def _encrypt(out: zmq.Socket[bytes], listening: zmq.asyncio.Socket, token: str) -> None:
    """Let only those talk and listen that have the token: all routers have the same CURVE key, made from it."""
    secret = zmq.utils.z85.encode(hashlib.sha256(b"kvatlas route.peersToken\0" + token.encode()).digest())
    public = zmq.curve_public(secret)
    out.set(zmq.CURVE_SERVER, 1)
    out.set(zmq.CURVE_SECRETKEY, secret)
    own_public, own_secret = zmq.curve_keypair()
    listening.set(zmq.CURVE_SERVERKEY, public)
    listening.set(zmq.CURVE_PUBLICKEY, own_public)
    listening.set(zmq.CURVE_SECRETKEY, own_secret)
