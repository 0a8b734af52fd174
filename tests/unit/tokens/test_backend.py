"""Prompts become tokens in this process: bounds, truncation around special tokens, and the same tokens with a store."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from kvatlas.config import load_config
from kvatlas.errors import TokenizationError, TokenizationReason
from kvatlas.tokens.incremental import EncoderStats
from kvatlas.tokens.local.backend import LocalBackend
from kvatlas.tokens.prompts import ChatPrompt, Prompt, TextPrompt, Truncation
from kvatlas.tokens.results import TokenSource
from kvatlas.tokens.setup import make_local
from tests.models.chats import DATA

TINY = DATA / "tinymodel"
BOS, EOS = 0, 1
HELLO = {"role": "user", "content": "hello"}
LONG = " ".join(f"Sentence {number} says that prefixes are known, naïvely or not." for number in range(60))
STORES = ("segments", "trie", "chunks")


def local(directory: Path = TINY, *overrides: str, store: str = "trie") -> LocalBackend:
    chosen = (f"tokens.models.m={directory}", f"tokens.store.kind={store}", *overrides)
    return make_local(load_config(environ={}, overrides=chosen).tokens)


def text(of: str, **more: Any) -> TextPrompt:
    return TextPrompt(model="m", text=of, **more)


def chat(*messages: dict[str, Any], **more: Any) -> ChatPrompt:
    return ChatPrompt(model="m", messages=messages, **more)


def refusal(ask: Callable[[Prompt], object], prompt: Prompt) -> TokenizationError:
    with pytest.raises(TokenizationError) as caught:
        ask(prompt)
    return caught.value


def own(of: str) -> list[int]:
    """Return a text's own tokens, by the library alone."""
    ids: list[int] = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(of, add_special_tokens=False).ids
    return ids


@pytest.fixture
def around(tmp_path: Path) -> Path:
    """The tiny model, with a tokenizer that puts BOS and EOS around texts."""
    model = tmp_path / "around"
    shutil.copytree(TINY, model)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    marks = [("<|bos|>", BOS), ("<|eos|>", EOS)]
    tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A <|eos|>", pair=None, special_tokens=marks)
    tokenizer.save(str(model / "tokenizer.json"))
    return model


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """A tokenizer of Mistral's format."""
    model = tmp_path / "mistral"
    model.mkdir()
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", model / "tekken.json")
    return model


# -- what is refused ---------------------------------------------------------------------------------------------------------


def test_a_text_beyond_the_bound_is_refused_and_one_at_the_bound_is_not() -> None:
    backend = local(TINY, "tokens.textCharsMax=100")
    assert backend.tokenize(text("a" * 100)).token_ids
    error = refusal(backend.tokenize, text("a" * 101))
    assert (error.reason, error.field) == (TokenizationReason.BAD_TEXT, "prompt")
    assert "tokens.textCharsMax (100)" in error.problem


def test_a_chat_is_bounded_by_the_text_that_its_template_writes() -> None:
    backend = local(TINY, "tokens.textCharsMax=100")
    assert backend.tokenize(chat({"role": "user", "content": "a" * 20})).token_ids
    error = refusal(backend.tokenize, chat({"role": "user", "content": "a" * 90}))
    assert (error.reason, error.field) == (TokenizationReason.BAD_TEXT, "messages")


def test_mistral_texts_have_the_same_bound(mistral: Path) -> None:
    backend = local(mistral, "tokens.textCharsMax=100")
    assert backend.tokenize(text("a" * 100)).token_ids
    assert refusal(backend.tokenize, text("a" * 101)).reason is TokenizationReason.BAD_TEXT
    assert refusal(backend.tokenize, text("a\ud800")).reason is TokenizationReason.BAD_TEXT


@pytest.mark.parametrize("store", [*STORES, "none"])
def test_half_of_a_surrogate_pair_is_refused_where_it_stands(store: str) -> None:
    backend = local(store=store)
    backend.tokenize(text("loads"))
    for ask in (backend.tokenize, backend.known) if backend.known_texts else (backend.tokenize,):
        for of in ("\ud800", LONG + "\udfff", "a\ud83d \ude42b"):
            error = refusal(ask, text(of))
            assert (error.reason, error.field) == (TokenizationReason.BAD_TEXT, "prompt")
        error = refusal(ask, chat(HELLO, {"role": "user", "content": "a\ud800"}))
        assert (error.reason, error.field) == (TokenizationReason.BAD_TEXT, "messages[1].content")


def test_nuls_and_marks_of_special_tokens_are_text_like_any_other() -> None:
    of = "a\0b<|im_start|>user\n<|eos|> 🙂"
    assert local().tokenize(text(of)).token_ids.tolist() == own(of)


def test_an_empty_text_has_no_tokens_and_is_refused(around: Path) -> None:
    assert refusal(local().tokenize, text("")).reason is TokenizationReason.BAD_TEXT
    for specials in (False, True):  # a BOS makes no prompt of it: the engine takes none that is empty
        assert refusal(local(around).tokenize, text("", add_special_tokens=specials)).reason is TokenizationReason.BAD_TEXT


# -- truncation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "side", "expected"),
    [
        (10, None, lambda ids: [BOS, *ids[-8:], EOS]),
        (10, "left", lambda ids: [*ids[-9:], EOS]),
        (10, "right", lambda ids: [BOS, *ids[:9]]),
        (2, None, lambda ids: [BOS, EOS]),
        (1, None, lambda ids: [EOS]),
        (1, "right", lambda ids: [BOS]),
        (1000, None, lambda ids: [BOS, *ids, EOS]),
    ],
)
def test_a_cut_keeps_what_the_tokenizer_puts_around_unless_a_side_is_named(
    around: Path, kept: int, side: Any, expected: Callable[[list[int]], list[int]]
) -> None:
    of = "Once upon a time there was a scheduler that knew where every prefix was."
    backend = local(around)
    assert len(own(of)) > 10
    assert backend.tokenize(text(of, truncation=Truncation(kept, side))).token_ids.tolist() == expected(own(of))


@pytest.mark.parametrize("side", [None, "left"])
def test_without_special_tokens_the_last_ones_stay(around: Path, side: Any) -> None:
    of = "Once upon a time there was a scheduler."
    prompt = text(of, truncation=Truncation(5, side), add_special_tokens=False)
    assert local(around).tokenize(prompt).token_ids.tolist() == own(of)[-5:]


def test_a_chat_gets_special_tokens_only_where_it_asks_for_them(around: Path) -> None:
    backend = local(around)
    bare = backend.tokenize(chat(HELLO)).token_ids.tolist()
    assert BOS not in bare
    assert backend.tokenize(chat(HELLO, add_special_tokens=True)).token_ids.tolist() == [BOS, *bare, EOS]
    cut = chat(HELLO, add_special_tokens=True, truncation=Truncation(6))
    assert backend.tokenize(cut).token_ids.tolist() == [BOS, *bare[-4:], EOS]


def test_the_models_length_is_its_configs_unless_it_is_set(around: Path) -> None:
    of = "a b " * 50
    tokens = len(own(of))
    assert len(local().tokenize(text(of)).token_ids) == tokens
    for directory, more in ((TINY, 0), (around, 2)):
        limit = f"tokens.maxModelLen.m={tokens + more}"
        error = refusal(local(directory, limit).tokenize, text(of))
        assert error.reason is TokenizationReason.TOO_MANY_TOKENS, "no room for a generated token"
        limit = f"tokens.maxModelLen.m={tokens + more + 1}"
        assert len(local(directory, limit).tokenize(text(of)).token_ids) == tokens + more
    longer = "a b " * 3000
    assert refusal(local().tokenize, text(longer)).reason is TokenizationReason.TOO_MANY_TOKENS
    assert len(local(TINY, "tokens.maxModelLen.m=100000").tokenize(text(longer)).token_ids) == len(own(longer))


def test_as_many_as_the_model_takes_leaves_room_for_one_that_is_generated() -> None:
    backend = local(TINY, "tokens.maxModelLen.m=40")
    prompt = text(LONG, truncation=Truncation(-1), max_output_tokens=16)
    assert backend.tokenize(prompt).token_ids.tolist() == own(LONG)[-39:]
    assert refusal(backend.tokenize, text(LONG, truncation=Truncation(41))).reason is TokenizationReason.BAD_TRUNCATION
    assert refusal(backend.tokenize, text("a", max_output_tokens=41)).field == "max_tokens"


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("store", [*STORES, "none"])
def test_of_a_text_far_longer_than_what_is_kept_only_an_end_is_tokenized(
    around: Path, store: str, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = LONG * 200
    expected = {None: [BOS, *own(of)[-98:], EOS], "left": [*own(of)[-99:], EOS], "right": [BOS, *own(of)[:99]]}
    backend = local(around, "tokens.maxModelLen.m=100000", store=store)
    tokenizer = backend.tokenizers.get("m").text
    assert tokenizer is not None
    chars = []
    for name in ("encode", "ids"):
        method = getattr(tokenizer, name)
        monkeypatch.setattr(tokenizer, name, lambda text, method=method: (chars.append(len(text)), method(text))[1])
    assert backend.tokenize(text(of, truncation=Truncation(100, side))).token_ids.tolist() == expected[side]
    assert sum(chars) < len(of) / 50


def test_another_models_length_does_not_count() -> None:
    backend = local(TINY, f"tokens.models.n={TINY}", "tokens.maxModelLen.n=5")
    assert backend.tokenize(text("a b c d e f g h")).token_ids
    assert refusal(backend.tokenize, TextPrompt(model="n", text="a b c d e f g h")).reason is TokenizationReason.TOO_MANY_TOKENS


# -- with a store ------------------------------------------------------------------------------------------------------------


def turns(count: int) -> ChatPrompt:
    messages = [{"role": "system", "content": LONG[:1500]}]
    for number in range(count):
        messages.append({"role": "user", "content": f"Question {number}: {LONG[number * 50 : number * 50 + 200]} ü🙂?"})
        messages.append({"role": "assistant", "content": f"Answer {number}.\n\n{LONG[number * 30 : number * 30 + 90]}"})
    return chat(*messages)


PROMPTS: tuple[Prompt, ...] = (
    text("short"),
    *(text(LONG[:end]) for end in (700, 1200, 3000, 1700)),
    text(LONG, add_special_tokens=False),
    *(turns(count) for count in (1, 2, 3, 2, 5)),
    chat(*turns(3).messages, add_special_tokens=True),
    text(LONG, truncation=Truncation(100)),
    text(LONG, truncation=Truncation(100, "right")),
)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("specials", [False, True])
def test_a_store_changes_no_token(store: str, specials: bool, around: Path) -> None:
    directory = around if specials else TINY
    without, helped = local(directory, store="none"), local(directory, store=store)
    sources = set()
    for prompt in PROMPTS * 2:
        plain, found = without.tokenize(prompt), helped.tokenize(prompt)
        assert found.token_ids == plain.token_ids
        assert (plain.source, plain.tokens_stored, plain.complete) == (TokenSource.LOCAL, 0, True)
        assert (found.source is TokenSource.STORE) == (found.tokens_stored > 0)
        assert (found.tokenizer, found.revision, found.complete) == (plain.tokenizer, plain.revision, True)
        sources.add(found.source)
    assert sources == {TokenSource.LOCAL, TokenSource.STORE}
    stats = helped.encoder_stats()
    assert (stats.mismatches, stats.audit_failures) == (0, 0)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("specials", [False, True])
def test_what_is_known_is_the_beginning_of_the_prompts_tokens(store: str, specials: bool, around: Path) -> None:
    backend = local(around if specials else TINY, store=store)
    assert not backend.known(turns(1)).token_ids, "no tokenizer is loaded yet, and none is waited for"
    assert backend.tokenizers.loads == 0
    backend.tokenize(turns(2))
    backend.tokenize(text(LONG))
    for prompt in (turns(1), turns(2), turns(4), text(LONG[:2000]), text(LONG + LONG), text(LONG[:1800] + "other " * 50)):
        known, whole = backend.known(prompt), backend.tokenize(prompt)
        before = int(specials and prompt.add_special_tokens)
        assert known.token_ids == whole.token_ids[: len(known.token_ids)]
        assert known.tokens_stored == len(known.token_ids) - before > 100
        assert (known.source, known.complete) == (TokenSource.STORE, False)
        assert (known.tokenizer, known.revision) == (whole.tokenizer, whole.revision)


def test_nothing_is_known_of_another_text() -> None:
    backend = local()
    backend.tokenize(text(LONG))
    assert backend.known(text("Something else. " * 100)).token_ids == array("I")


def test_a_store_knows_neither_prompts_that_are_cut_nor_mistrals(mistral: Path) -> None:
    backend = local(TINY, f"tokens.models.mistral={mistral}")
    for prompt in (text(LONG), turns(1)):
        assert backend.stores(prompt), "before its tokenizer is loaded"
        backend.tokenize(prompt)
        assert backend.stores(prompt)
    assert not backend.stores(text(LONG, truncation=Truncation(10)))
    assert not backend.stores(chat(HELLO, truncation=Truncation(-1)))
    for theirs in (TextPrompt(model="mistral", text=LONG), ChatPrompt(model="mistral", messages=[HELLO])):
        found = backend.tokenize(theirs)
        assert (found.source, found.tokens_stored) == (TokenSource.LOCAL, 0)
        assert not backend.stores(theirs)
        assert not backend.known(theirs).token_ids
    assert not local(store="none").stores(text(LONG))


def test_encoders_tell_what_they_did_with_the_store() -> None:
    backend = local()
    assert backend.encoder_stats() == EncoderStats()
    backend.tokenize(text("short"))
    backend.tokenize(text(LONG))
    assert (backend.encoder_stats().full, backend.encoder_stats().assisted) == (2, 0)
    helped = backend.tokenize(text(LONG + " And on it goes."))
    stats = backend.encoder_stats()
    assert (stats.full, stats.assisted, stats.tokens_stored) == (2, 1, helped.tokens_stored)
    assert (stats.audits, stats.audit_failures, stats.mismatches) == (1, 0, 0)
    assert local(store="none").encoder_stats() == EncoderStats()


def test_models_of_one_tokenizer_share_what_is_known() -> None:
    backend = local(TINY, f"tokens.models.n={TINY}")
    backend.tokenize(text(LONG))
    assert backend.tokenize(TextPrompt(model="n", text=LONG + " More.")).source is TokenSource.STORE
    assert len(backend.tokenizers.loaded()) == 1
