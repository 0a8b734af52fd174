"""Frames through the applier: whether the index reads payloads by itself or gets decoded events, the outcome is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.index import IndexLimits
from kvatlas.ingest.apply import Applied, Applier
from kvatlas.ingest.decode.vllm import VllmDecoder
from kvatlas.ingest.recording import read_frames
from kvatlas.keys import KeySchema
from kvatlas.observe.metrics import Metrics
from kvatlas.types import Frame, PodId, Stream
from tests.contract.implementations import IMPLEMENTATIONS

pytest.importorskip("kvatlas._native", reason="an installation without the native core")

CAPTURES = Path(__file__).parents[1] / "data" / "vllm-0.32"
STREAM = Stream(PodId("pod"))
FRAMES = [
    frame
    for path in sorted(CAPTURES.glob("*.bin"))
    if not path.name.endswith(".replay.bin")
    for frame in list(read_frames(path))[:40]
]


def outcome(core: str, frames: list[Frame]) -> tuple[Applied, object, object]:
    index = IMPLEMENTATIONS[core](KeySchema(16), IndexLimits(), lambda: 0.0)
    applied = Applier(index, Metrics(core=core), {"alias": "m"}).apply(STREAM, frames, VllmDecoder(), "alias")
    stats = index.stats()
    return applied, index.streams(), (stats.blocks, stats.entries, stats.orphans)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_frames_between_good_ones_change_nothing_else(data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(FRAMES) - 1))
    frames = FRAMES[first : first + data.draw(st.integers(1, 30))]
    damaged = []
    for frame in frames:
        payload = bytearray(frame.payload)
        if data.draw(st.integers(0, 3)) == 0:
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
        damaged.append(Frame(frame.topic, frame.seq, bytes(payload), frame.received_ns))
    assert outcome("native", damaged) == outcome("reference", damaged)


def test_events_are_counted_alike_for_all_captures() -> None:
    assert outcome("native", FRAMES) == outcome("reference", FRAMES)
