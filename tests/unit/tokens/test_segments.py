"""The native twin of a tokenizer, and what it knows of segments of texts."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from tokenizers import Tokenizer, models, trainers

from kvatlas.tokens.encoding import Encoding
from kvatlas.tokens.local.twin import twin
from kvatlas.tokens.seams import Seams
from kvatlas.tokens.segments import KnownSegments, SegmentEncoder
from tests.models.chats import DATA

pytest.importorskip("kvatlas._native")

TINY = str(DATA / "tinymodel" / "tokenizer.json")
WORDS = "the fleet holds every prefix that a request may need and the router knows it"


class Text:
    """A text tokenizer over a backend and its twin."""

    before: array[int] = array("I")
    after: array[int] = array("I")

    def __init__(self, backend: Any, seams: Seams) -> None:
        self.backend = backend
        self.native = twin(backend)
        self._seams = seams

    def seams(self) -> Seams:
        return self._seams

    def encode(self, text: str) -> Encoding:
        encoded = self.backend.encode(text, add_special_tokens=False)
        return Encoding(array("I", encoded.ids), array("I", [end for _, end in encoded.offsets]))

    def ids(self, text: str) -> array[int]:
        return self.encode(text).token_ids


class Otherwise:
    """A backend that tells other tokens than the JSON that it gives."""

    encode_special_tokens = False

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        return self._backend.encode(text + "!", add_special_tokens=add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class Unreadable(Otherwise):
    def to_str(self) -> str:
        return '{"model": {"type": "of the future"}}'


def tiny() -> Any:
    backend: Any = Tokenizer.from_file(TINY)
    backend.post_processor = None
    return backend


def encoder(bytes_max: int = 1 << 20, audit_every: int = 256) -> tuple[KnownSegments, SegmentEncoder]:
    backend = tiny()
    known = KnownSegments(bytes_max)
    made = known.encoder(Text(backend, Seams.of(backend)), "tiny", audit_every=audit_every)
    assert made is not None
    return known, made


def test_a_twin_tells_the_same_tokens() -> None:
    backend = tiny()
    native = twin(backend)
    assert native is not None
    assert array("I", native.ids(WORDS)).tolist() == backend.encode(WORDS, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", [Otherwise, Unreadable])
def test_there_is_no_twin_that_tells_other_tokens_or_cannot_be_read(kind: type[Otherwise], caplog: Any) -> None:
    assert twin(kind(tiny())) is None
    assert "used from Python" in caplog.text


def test_marks_of_special_tokens_are_text_where_the_backend_takes_them_so() -> None:
    backend = tiny()
    backend.encode_special_tokens = True
    native = twin(backend)
    assert native is not None
    assert len(native.ids("<|im_end|>")) > 4


def test_words_are_known_wherever_they_were_learnt() -> None:
    known, ours = encoder()
    first = ours.encode(WORDS)
    again = ours.encode("Now " + " ".join(reversed(WORDS.split(" "))) + " ends")
    assert first.tokens_stored == 0
    assert again.token_ids.tolist() == tiny().encode("Now " + " ".join(reversed(WORDS.split(" "))) + " ends").ids
    assert again.tokens_stored > len(again.token_ids) / 2
    assert ours.stats().assisted == 1
    assert ours.stats().audits == 1
    assert known.stats().entries > 10


def test_what_is_known_of_a_beginning_begins_every_text_that_goes_on() -> None:
    _, ours = encoder()
    assert ours.known(WORDS).tolist() == []
    ours.encode(WORDS + " and more of it")
    prefix = ours.known(WORDS + " but something else").tolist()
    assert len(prefix) > 10
    for text in (WORDS + " but", WORDS + " and\n", WORDS + "ally"):
        assert tiny().encode(text).ids[: len(ours.known(text))] == ours.known(text).tolist()


def test_memory_is_bounded() -> None:
    known, ours = encoder(bytes_max=50_000)
    for number in range(400):
        ours.encode(" ".join(f"w{letter}{chr(97 + number % 26)}{number}x" for letter in "abcdefgh"))
        assert known.stats().bytes_estimated <= 50_000 + 4_096
    assert known.stats().evicted > 0


def test_tokens_are_right_and_the_known_is_off_where_the_proof_does_not_hold(caplog: Any) -> None:
    """A tokenizer of which entries go across words, with seams that it does not have."""
    backend: Any = Tokenizer(models.BPE())
    backend.train_from_iterator([WORDS] * 9, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    lying = Seams({}, "abcdefghijklmnopqrstuvwxyz", True, ())
    ours = KnownSegments(1 << 20).encoder(Text(backend, lying), "lying", audit_every=1)
    assert ours is not None
    words = WORDS.split(" ")
    for start in range(len(words)):
        for count in (1, 2, 3, 5):
            text = " ".join((words[start:] + words[:start])[:count])
            assert ours.encode(text).token_ids.tolist() == backend.encode(text).ids
    assert ours.stats().mismatches + ours.stats().audit_failures > 0
    if ours.off is not None:
        assert ours.off in caplog.text


def test_what_a_model_cannot_tokenize_is_refused_as_by_the_wheel() -> None:
    data = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, "added_tokens": []}
    native = twin_of(json.dumps(data))
    with pytest.raises(ValueError, match="UNK"):
        native.ids("b")


def twin_of(description: str) -> Any:
    from kvatlas import _native

    return _native.TextEncoder(description, False)
