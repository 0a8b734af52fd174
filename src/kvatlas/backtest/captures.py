"""Capture files as one sequence of frames. Several files are several streams: ranks, pods, or parts of one recording."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kvatlas.ingest.decode.header import peek_header
from kvatlas.ingest.recording import read_frames
from kvatlas.ingest.topic import parse_topic
from kvatlas.types import DpRank, Frame, PodId, Stream


class Captures:
    """Opened captures. Reading them costs one frame a file in memory.

    A frame's stream is what its topic and its payload's rank say; a topic that names no pod leaves the file's name.
    """

    def __init__(self, paths: Sequence[Path], *, tolerate_truncation: bool = False) -> None:
        """Read all files once, for their streams. RecordingError for a file that is no capture."""
        self.paths = tuple(paths)
        self._tolerate_truncation = tolerate_truncation
        self.frames = 0
        self._models: dict[Stream, str | None] = {}
        for path in self.paths:
            for stream, frame in self._read(path):
                self.frames += 1
                if self._models.get(stream) is None:
                    self._models[stream] = parse_topic(frame.topic)[1]

    @property
    def models(self) -> Mapping[Stream, str | None]:
        """Every stream in the files, and the model that its topic names."""
        return self._models

    def model_names(self) -> frozenset[str]:
        """Return the models that topics name."""
        return frozenset(model for model in self._models.values() if model is not None)

    def __iter__(self) -> Iterator[tuple[Stream, Frame]]:
        """Yield all frames in order of their receive time; a file's own order is kept."""
        return heapq.merge(*(self._read(path) for path in self.paths), key=lambda entry: entry[1].received_ns)

    def _read(self, path: Path) -> Iterator[tuple[Stream, Frame]]:
        for frame in read_frames(path, tolerate_truncation=self._tolerate_truncation):
            pod = parse_topic(frame.topic)[0] or PodId(path.name)
            rank = peek_header(frame.payload).dp_rank
            yield Stream(pod, DpRank(0) if rank is None else rank), frame
