"""The native core hashes prompts and keeps routing history as Python does: matches, evictions and sizes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kvatlas._native")

from kvatlas.route.endpoint import EndpointName
from kvatlas.route.prefix.hashes import piece_hashes
from kvatlas.route.prefix.history import BLOCK_BYTES, ENTRY_BYTES, History
from kvatlas.route.prefix.native import NativeHistory, make_history, native_piece_hashes

ENDPOINTS = [EndpointName(f"e{number}") for number in range(70)]
"""More than fit one word of bits."""
endpoints = st.one_of(st.sampled_from(ENDPOINTS[:3]), st.sampled_from(ENDPOINTS))
chains = st.tuples(st.integers(0, 3), st.integers(0, 8)).map(lambda one: [one[0] * 100 + number for number in range(one[1])])
hashes = st.one_of(chains, st.lists(st.integers(0, (1 << 64) - 1), max_size=5), st.lists(st.integers(0, 9), max_size=9))
steps = st.one_of(
    st.tuples(st.just("record"), endpoints, hashes, st.integers(1, 12)),
    st.tuples(st.just("keep"), st.sets(endpoints, max_size=4)),
    st.tuples(st.just("fill"), st.integers(1, 70), hashes),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(steps, max_size=40), st.lists(hashes, min_size=1, max_size=6), st.integers(0, 60))
def test_both_match_and_evict_alike(taken: list[tuple], asked: list[list[int]], entries: int) -> None:
    bytes_max = entries * (BLOCK_BYTES + ENTRY_BYTES)
    python, native = History(bytes_max), NativeHistory(bytes_max)
    for step in taken:
        for history in (python, native):
            match step:
                case ("record", endpoint, chain, capacity):
                    history.record(endpoint, chain, capacity)
                case ("keep", kept):
                    history.keep(kept)
                case ("fill", count, chain):
                    for endpoint in ENDPOINTS[:count]:
                        history.record(endpoint, chain, 100)
        assert native.stats() == python.stats()
    for chain in asked:
        assert native.match(chain) == python.match(chain)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=700),
    st.integers(1, 64),
    st.integers(0, (1 << 64) - 1),
    st.dictionaries(st.integers(0, 12), st.binary(max_size=9), max_size=3),
)
def test_both_hash_alike(content: bytes, piece_bytes: int, root: int, added: dict[int, bytes]) -> None:
    assert native_piece_hashes is not None
    extras = {number * piece_bytes: value for number, value in added.items()}
    asked = (memoryview(content), piece_bytes, root, extras)
    assert native_piece_hashes(*asked) == piece_hashes(*asked)


def test_python_is_used_where_it_is_asked_for() -> None:
    assert isinstance(make_history(1 << 20), NativeHistory)
    assert isinstance(make_history(1 << 20, natively=False), History)
