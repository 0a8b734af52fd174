"""Where frames come from. A source moves bytes; what they mean is decided behind the :class:`Sink`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from kvatlas.types import DpRank, Frame, PodId, Stream


class Replayer(Protocol):
    """Asks one engine for frames that it keeps."""

    def replay(self, start_seq: int) -> AsyncGenerator[Frame, None]:
        """Yield the kept frames from ``start_seq`` on, oldest first; ends at the engine's end marker.

        Frames may be missing in between (the engine's socket drops what does not fit). TimeoutError if nothing comes, OSError
        if the socket fails.
        """
        ...


class Origin(msgspec.Struct, frozen=True, eq=False):
    """What a source knows of where its frames come from, beyond what they say themselves."""

    source: str
    """For people: an endpoint, a file, ``in-process``."""
    decoder: str = "vllm"
    pod: PodId | None = None
    """Overrides the topic's pod."""
    model: str | None = None
    """Overrides the topic's model."""
    fallback_pod: PodId | None = None
    """Used where neither the settings nor the topic name a pod."""
    dp_rank: DpRank | None = None
    """Used where the payload does not name a rank."""
    replay_endpoint: str | None = None
    """Where to ask for lost frames. May hold ``{host}`` and ``{pod}`` where many pods come from here; rank r is at port + r."""

    def replay_endpoint_of(self, stream: Stream) -> str | None:
        """Return the replay endpoint of a stream that came from here."""
        if self.replay_endpoint is None:
            return None
        host = stream.pod.rpartition(":")[0] or stream.pod
        endpoint = self.replay_endpoint.replace("{host}", host).replace("{pod}", stream.pod)
        if self.dp_rank is not None:
            return endpoint
        address, _, port = endpoint.rpartition(":")
        return f"{address}:{int(port) + stream.dp_rank}"


class Sink(Protocol):
    """Takes what sources bring. Called on the event loop; never blocks."""

    def frame(self, origin: Origin, frame: Frame) -> None:
        """Take one frame."""
        ...

    def connected(self, origin: Origin) -> None:
        """The link to an origin stands (again): frames may have been missed."""
        ...

    def disconnected(self, origin: Origin) -> None:
        """The link to an origin is down: frames are being missed."""
        ...

    def malformed(self, origin: Origin, detail: str) -> None:
        """A message came that is no frame."""
        ...


class EventSource(Protocol):
    """Brings frames to a sink until it is cancelled or has no more."""

    @property
    def name(self) -> str: ...

    async def run(self, sink: Sink) -> None: ...
