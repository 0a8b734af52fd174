"""Whatever bytes come, a connection neither fails inside nor says much more than it heard; how they are cut does not matter."""

from __future__ import annotations

import itertools

from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from kvatlas.serve.h2 import frames
from kvatlas.serve.h2.connection import Connection, Event
from kvatlas.serve.h2.frames import frame

stream_ids = st.integers(0, 9)
payloads = st.one_of(
    st.binary(max_size=40), st.just(Encoder().encode({":path": "/a"})), st.just(b"\0\0\0\1"), st.just(b"x" * 8)
)
some_frames = st.builds(frame, st.integers(0, 11), st.integers(0, 255), stream_ids, payloads)
sane_frames = st.builds(frame, st.sampled_from([0, 1, 3, 4, 6, 8]), st.sampled_from([0, 4, 5, 1]), stream_ids, payloads)


@given(st.lists(st.one_of(some_frames, sane_frames, st.binary(max_size=20)), max_size=30), st.booleans())
@settings(deadline=None, max_examples=400)
def test_any_bytes_are_survived(parts: list[bytes], greets: bool) -> None:
    connection = Connection(4)
    began = len(connection.output())
    sent = (frames.PREFACE if greets else b"") + b"".join(parts)
    events = connection.receive(sent)
    assert len(events) <= len(parts) + 1 + len(sent) // frames.HEAD_BYTES
    assert len(connection.output()) <= began + 200 + 20 * (len(sent) // frames.HEAD_BYTES + 1)


@given(st.lists(sane_frames, max_size=20), st.lists(st.integers(0, 600), max_size=8))
@settings(deadline=None, max_examples=200)
def test_how_bytes_are_cut_makes_no_difference(parts: list[bytes], cuts: list[int]) -> None:
    sent = frames.PREFACE + b"".join(parts)
    whole, cut = Connection(4), Connection(4)
    expected = whole.receive(sent)
    places = [0, *sorted(min(place, len(sent)) for place in cuts), len(sent)]
    events: list[Event] = []
    for start, end in itertools.pairwise(places):
        events += cut.receive(sent[start:end])
    assert events == expected
    assert cut.output() == whole.output()
