"""Listening to engines beside whoever else does: for recordings and for diagnosis. Judges nothing, changes nothing.

A tap that asks for history first holds live frames back until the engine's kept ones have been taken, so that each engine's
frames come in order and once.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Sequence

import msgspec
import zmq.asyncio

from kvatlas.errors import SourceError
from kvatlas.ingest.sources import Origin
from kvatlas.ingest.sources.zmq import SocketLimits, ZmqReplayer, ZmqSource
from kvatlas.types import Frame

_ADDRESS = re.compile(r"tcp://\S+:[0-9]{1,5}|(ipc|inproc)://\S+")

SUBSCRIBED_AFTER_S = 0.1
"""From the handshake until an engine surely has our subscription; nothing tells when it does."""


class TappedEngine(msgspec.Struct, frozen=True):
    """Where one engine (one rank) publishes, and where it answers replay requests if that is wanted."""

    endpoint: str
    replay_endpoint: str | None = None


class TapLimits(msgspec.Struct, frozen=True):
    """When a tap ends by itself, and how long it waits."""

    duration_s: float | None = None
    frames_max: int | None = None
    """In all, kept ones included."""
    connect_timeout_s: float = 3.0
    """How long to wait for a connection before asking for history all the same."""
    replay_timeout_s: float = 3.0
    held_frames_max: int = 100_000
    """Live frames held back while history comes; later ones are let go, which shows as a gap."""


class Heard(msgspec.Struct):
    """What became of one engine's tap so far."""

    engine: TappedEngine
    connected: bool = False
    live_frames: int = 0
    kept_frames: int = 0
    """Frames that the replay brought."""
    replay_answered: bool | None = None
    """None: not asked (yet)."""
    malformed: int = 0
    """Messages that are no frames."""


Take = Callable[[Heard, Frame, bool], None]
"""Called with each frame, and whether it is live (rather than from the replay)."""


class Tap:
    """One run over several engines. ``take`` is called on the event loop."""

    def __init__(
        self, engines: Sequence[TappedEngine], take: Take, *, topic_filter: str = "", limits: TapLimits | None = None
    ) -> None:
        self.heard = [Heard(engine) for engine in engines]
        self._take = take
        self._topic_filter = topic_filter
        self._limits = limits or TapLimits()
        self._frames = 0
        self._done: asyncio.Event = asyncio.Event()

    async def run(self, stop: asyncio.Event | None = None) -> list[Heard]:
        """Listen until a limit is reached or ``stop`` is set. SourceError for an address that cannot be connected to."""
        for heard in self.heard:
            for address in (heard.engine.endpoint, heard.engine.replay_endpoint):
                if address is not None and not _ADDRESS.fullmatch(address):
                    raise SourceError(address, "is no address", 'use one such as "tcp://10.0.0.7:5557"')
        self._done = stop or asyncio.Event()
        context = zmq.asyncio.Context()
        tasks = [asyncio.create_task(self._listen(context, heard)) for heard in self.heard]
        waiter = asyncio.create_task(self._done.wait())
        try:
            await asyncio.wait([*tasks, waiter], timeout=self._limits.duration_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*tasks, waiter):
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            context.destroy(linger=0)
        for result in results:
            if isinstance(result, Exception):
                raise _cause(result)
        return self.heard

    async def _listen(self, context: zmq.asyncio.Context, heard: Heard) -> None:
        origin = Origin(heard.engine.endpoint)
        source = ZmqSource(context, heard.engine.endpoint, origin, topic_filter=self._topic_filter)
        listener = _Listener(heard, self._count, self._limits.held_frames_max)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(source.run(listener))
            if heard.engine.replay_endpoint is not None:
                tasks.create_task(self._fetch_history(context, heard.engine.replay_endpoint, listener))
            else:
                listener.release()

    async def _fetch_history(self, context: zmq.asyncio.Context, endpoint: str, listener: _Listener) -> None:
        heard = listener.heard
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(listener.linked.wait(), self._limits.connect_timeout_s)
            await asyncio.sleep(SUBSCRIBED_AFTER_S)
        replayer = ZmqReplayer(context, endpoint, self._limits.replay_timeout_s, SocketLimits())
        try:
            async with contextlib.aclosing(replayer.replay(0)) as frames:
                async for frame in frames:
                    listener.kept(frame)
            heard.replay_answered = True
        except (TimeoutError, OSError):
            heard.replay_answered = heard.kept_frames > 0
        finally:
            listener.release()

    def _count(self, heard: Heard, frame: Frame, live: bool) -> None:
        if self._done.is_set():
            return
        self._frames += 1
        heard.live_frames += live
        heard.kept_frames += not live
        self._take(heard, frame, live)
        if self._limits.frames_max is not None and self._frames >= self._limits.frames_max:
            self._done.set()


class _Listener:
    """A sink for one engine: holds live frames until :meth:`release`."""

    def __init__(self, heard: Heard, take: Take, held_frames_max: int) -> None:
        self.heard = heard
        self.linked = asyncio.Event()
        self._take = take
        self._held: list[Frame] | None = []
        self._held_frames_max = held_frames_max
        self._last_kept: int | None = None

    def kept(self, frame: Frame) -> None:
        """Take a frame of the replay."""
        self._last_kept = frame.seq
        self._take(self.heard, frame, False)

    def release(self) -> None:
        """Hand on the frames held back, less those that the replay brought, and all later ones at once."""
        held, self._held = self._held or [], None
        for frame in held:
            if self._last_kept is None or frame.seq is None or frame.seq > self._last_kept:
                self._take(self.heard, frame, True)

    def frame(self, origin: Origin, frame: Frame) -> None:
        if self._held is None:
            self._take(self.heard, frame, True)
        elif len(self._held) < self._held_frames_max:
            self._held.append(frame)

    def connected(self, origin: Origin) -> None:
        self.heard.connected = True
        self.linked.set()

    def disconnected(self, origin: Origin) -> None:
        self.linked.clear()

    def malformed(self, origin: Origin, detail: str) -> None:
        self.heard.malformed += 1


def _cause(error: BaseException) -> BaseException:
    """Return the SourceError in a group of errors, if there is one."""
    while isinstance(error, BaseExceptionGroup):
        error = next((inner for inner in error.exceptions if isinstance(inner, SourceError)), error.exceptions[0])
    return error
