"""A recorded capture as an event source: what an engine sent once, sent again."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kvatlas.ingest.recording import read_frames
from kvatlas.ingest.sources import Origin, Sink


class RecordingSource:
    """Plays a capture file into the sink at ``speed`` times its own pace; 0 means as fast as it can be read."""

    def __init__(self, path: Path, origin: Origin, speed: float = 0.0) -> None:
        self._path = path
        self._origin = origin
        self._speed = speed

    @property
    def name(self) -> str:
        return str(self._path)

    async def run(self, sink: Sink) -> None:
        previous_ns: int | None = None
        for frame in read_frames(self._path):
            if self._speed > 0 and previous_ns is not None:
                await asyncio.sleep(max(0, frame.received_ns - previous_ns) / 1e9 / self._speed)
            else:
                await asyncio.sleep(0)
            previous_ns = frame.received_ns
            sink.frame(self._origin, frame)
