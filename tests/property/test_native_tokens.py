"""The native encoder's tokens are those of the wheel, with known segments and without, for tokenizers of every kind."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from kvatlas.tokens.seams import Seams
from tests.property.test_prefix_stores import EXAMPLES, MAKERS, made, texts, turns

native = pytest.importorskip("kvatlas._native")


def numbers(data: bytes) -> list[int]:
    return array("I", data).tolist()


def encoder(kind: str) -> native.TextEncoder:
    return native.TextEncoder(made(kind)[0].to_str(), False)


def remembering(kind: str, store: native.SegmentStore) -> native.SegmentEncoder:
    seams: Seams = made(kind)[1]
    # No audits: they would hide what is wrong.
    return native.SegmentEncoder(encoder(kind), store, seams.letters, seams.newlines, list(seams.specials.items()), 1 << 60)


@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.parametrize("kind", MAKERS)
@given(text=texts())
def test_a_text_has_the_tokens_and_ends_that_the_wheel_gives_it(kind: str, text: str) -> None:
    right = made(kind)[0].encode(text, add_special_tokens=False)
    ours = encoder(kind)
    ids, ends = ours.encode(text)
    assert numbers(ours.ids(text)) == numbers(ids) == right.ids
    highest = 0
    assert numbers(ends) == [highest := max(highest, end) for _, end in right.offsets]


@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.parametrize("kind", MAKERS)
@given(said=turns(), bytes_max=st.sampled_from([1 << 24, 1 << 24, 1 << 16, 1 << 12, 1 << 10]))
def test_tokens_with_known_segments_are_those_of_the_whole_text(kind: str, said: list[str], bytes_max: int) -> None:
    tokenizer = made(kind)[0]
    ours = remembering(kind, native.SegmentStore(bytes_max))
    for text in (*said, *said):
        found, _, off = ours.tokens(text)
        assert numbers(found) == tokenizer.encode(text, add_special_tokens=False).ids
        assert off is None


@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.parametrize("kind", MAKERS)
@given(parts=st.lists(texts(), min_size=2, max_size=12), data=st.data())
def test_segments_learnt_anywhere_serve_any_other_text(kind: str, parts: list[str], data: st.DataObject) -> None:
    """The same pieces in another order: what stands around them differs."""
    tokenizer = made(kind)[0]
    ours = remembering(kind, native.SegmentStore(1 << 24))
    for _ in range(4):
        text = "".join(data.draw(st.permutations(parts)))
        found, _, off = ours.tokens(text)
        assert numbers(found) == tokenizer.encode(text, add_special_tokens=False).ids
        assert off is None
