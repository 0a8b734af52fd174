"""Tokens with a prefix store's help, and those of excerpts, are those of the whole text, for tokenizers of every kind."""

from __future__ import annotations

import functools
import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kvatlas.tokens.encoding import Encoding
from kvatlas.tokens.excerpt import first_tokens, last_tokens
from kvatlas.tokens.incremental import IncrementalEncoder
from kvatlas.tokens.seams import Seams
from kvatlas.tokens.stores import PrefixStore
from kvatlas.tokens.stores.chunks import ChunkStore
from kvatlas.tokens.stores.trie import TrieStore

EXAMPLES = 30 * int(os.environ.get("KVATLAS_EXAMPLES_FACTOR", "1"))
TINYMODEL = Path(__file__).parents[1] / "data" / "tinymodel" / "tokenizer.json"
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CL100K.replace("{1,3}", "")
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
DEEPSEEK = "|".join(
    [
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

WORDS = [
    *(
        "Hello",
        " world",
        " the",
        " a",
        " b",
        " aa",
        " of",
        "word",
        "s",
        "'s",
        "'ll",
        " don't",
        "Straße",
        " I",
        "x",
        "xx",
        "aaaa",
        "e",
    ),
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\n\n\n",
        "\t",
        "\r\n",
        " \n",
        "\n ",
        "\u00a0",
        "\u2003",
        "\u200b",
        "\x00",
        "▁",
        "▁a",
        "Ġ",
    ),
    *("1", "12", " 1234567", "٣", ".", ",", "!", "...", " ===", "=====", "(", ")", '": {"', "_", "-", " -- ", "/", "//"),
    *("def f(a, b):\n", "    return a + b\n", "if x == 1:\n\t", "}\n", "<div>", "http://a.b/c?d=e"),
    *(
        "你好",
        "。",
        "漢字",
        "かな",
        "한국어",
        "\uff46\uff55\uff4c\uff4c",
        "ﬁ",
        "é",
        "e\u0301",
        "\u0301",
        "a\u0328\u0301",
        "ñ",
        "İ",
        "ß",
        "Σ",
        "ς",
    ),
    *("😀", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "שלום", "مرحبا", "हिन्दी", "ไทย", "\u200f", "\ufeff"),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>!",
        "<|im_",
        "end|>",
        "<|",
        "<mask>",
        "<s>",
        "</s>",
        "<tool>",
        "[UNK]",
        "##a",
        "<0x41>",
    ),
    *("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "Answer", " Answer", "\nAnswer"),
    *(" one two three four five six", "\nlines of text\nmore of it\n", " The quick brown fox jumps over the lazy dog."),
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, this is a text of the words that one two three use.\n",
    "def f(a, b):\n    return a + b\n\nif x == 1:\n\tprint('a b of the', x)\n",
    "你好 世界。漢字 かな 한국어 été naïve Straße 😀 👩‍👩‍👧 שלום\n\nAnswer: don't, I'll, 1234567 ... === aaaa\n",
    "of the of the of the a b a b a b aa aa world the world\nlines\nof text\n\n\nmore of it",
]

UNK = "[UNK]"
Made = tuple[Tokenizer, Seams]


class Plain:
    """A tokenizer as the store sees it."""

    before: array[int] = array("I")
    after: array[int] = array("I")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> Encoding:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return Encoding(array("I", encoding.ids), array("I", [end for _, end in encoding.offsets]))

    def ids(self, text: str) -> array[int]:
        return self.encode(text).token_ids


def marked(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<s>", "</s>"])
    return tokenizer


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return marked(tokenizer)


def bpe(
    pre_tokenizer: Any, normalizer: Any = None, *, byte_level: bool = True, unk: str | None = None, **changes: Any
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=unk))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else [chr(code) for code in range(0x20, 0x7F)]
    special = [unk] if unk else []
    trained(
        tokenizer, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    )
    return changed(tokenizer, **changes) if changes else tokenizer


def changed(tokenizer: Tokenizer, **model: Any) -> Tokenizer:
    data = json.loads(tokenizer.to_str())
    data["model"].update(model)
    if model.get("byte_fallback"):
        highest = max(*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"]))
        data["model"]["vocab"].update({f"<0x{byte:02X}>": highest + 1 + byte for byte in range(256)})
    return Tokenizer.from_str(json.dumps(data))


def split(*patterns: str) -> Any:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def legacy() -> Any:
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def unigram(*, split: bool, scheme: str = "always", normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    unigrams = trainers.UnigramTrainer(vocab_size=250, unk_token=UNK, special_tokens=[UNK], show_progress=False)
    return trained(tokenizer, unigrams)


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=[UNK], show_progress=False))


def with_odd_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<|im_end|>!", "<|", AddedToken("<mask>", lstrip=True), AddedToken("<tool>", rstrip=True)])
    tokenizer.add_tokens([AddedToken("Answer", normalized=True), AddedToken("Hello", normalized=False)])
    return tokenizer


def metaspace(scheme: str, *, split: bool = False) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


LEGACY: dict[str, Any] = {"byte_fallback": True, "fuse_unk": True}
BYTES = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "tinymodel": lambda: Tokenizer.from_file(str(TINYMODEL)),
    "gpt2": lambda: bpe(BYTES()),
    "gpt2, space before": lambda: bpe(BYTES(add_prefix_space=True)),
    "llama3": lambda: bpe(split(CL100K), ignore_merges=True),
    "qwen2": lambda: bpe(split(QWEN2), normalizers.NFC()),
    "o200k": lambda: bpe(split(O200K)),
    "deepseek": lambda: bpe(split(r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+", DEEPSEEK)),
    "space before each piece": lambda: bpe(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CL100K), "isolated"), BYTES(add_prefix_space=True, use_regex=False)]
        )
    ),
    "metaspace first": lambda: bpe(metaspace("first"), byte_level=False, unk=UNK, **LEGACY),
    "metaspace always": lambda: bpe(metaspace("always"), byte_level=False, unk=UNK, **LEGACY),
    "metaspace split": lambda: bpe(metaspace("always", split=True), byte_level=False, unk=UNK, fuse_unk=True),
    "llama legacy": lambda: bpe(None, legacy(), byte_level=False, unk=UNK, **LEGACY),
    "llama legacy, words apart": lambda: apart(legacy()),
    "metaspace first, words apart": lambda: apart(None, metaspace("first")),
    "no pre-tokenizer": lambda: bpe(None, byte_level=False),
    "no pre-tokenizer, bytes": lambda: bpe(BYTES(use_regex=False)),
    "strip, lowercase": lambda: bpe(
        BYTES(), normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase(), normalizers.NFKC()])
    ),
    "unigram": lambda: unigram(split=True),
    "unigram first, NFKC": lambda: unigram(split=True, scheme="first", normalizer=normalizers.NFKC()),
    "unigram unsplit": lambda: unigram(split=False),
    "wordpiece": wordpiece,
    "gpt2, odd tokens": lambda: with_odd_tokens(bpe(BYTES())),
    "llama legacy, odd tokens": lambda: with_odd_tokens(apart(legacy())),
    "qwen2, odd tokens": lambda: with_odd_tokens(bpe(split(QWEN2), normalizers.NFC())),
}
IN_TEXT = {
    *("tinymodel", "gpt2", "gpt2, space before", "llama3", "qwen2", "o200k", "deepseek", "space before each piece"),
    *("metaspace split", "llama legacy, words apart", "metaspace first, words apart", "strip, lowercase", "unigram"),
    *("unigram first, NFKC", "wordpiece", "gpt2, odd tokens", "llama legacy, odd tokens", "qwen2, odd tokens"),
}


def apart(normalizer: Any, pre_tokenizer: Any = None) -> Tokenizer:
    """As sentencepiece trains BPE: no entry goes across words, though nothing splits a text into words later."""
    tokenizer = bpe(metaspace("always", split=True), byte_level=False, unk=UNK, **LEGACY)
    data = json.loads(tokenizer.to_str())
    data["normalizer"] = json.loads(normalizer.__getstate__()) if normalizer is not None else None
    data["pre_tokenizer"] = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer is not None else None
    return Tokenizer.from_str(json.dumps(data))


@functools.cache
def made(kind: str) -> Made:
    tokenizer = MAKERS[kind]()
    return tokenizer, Seams.of(tokenizer)


def texts() -> st.SearchStrategy[str]:
    characters = st.characters(exclude_categories=["Cs"])
    piece = st.one_of(*[st.sampled_from(WORDS)] * 6, st.text(characters, max_size=3))
    return st.lists(piece, max_size=40).map("".join)


@st.composite
def turns(draw: st.DrawFn) -> list[str]:
    """Texts one after the other: each goes on from an earlier one, cut or changed somewhere."""
    said = [draw(texts())]
    for _ in range(draw(st.integers(1, 8))):
        text = draw(st.sampled_from(said))
        at = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["go on", "go on", "cut", "change", "again"])):
            case "go on":
                said.append(text + draw(texts()))
            case "cut":
                said.append(text[:at] + draw(texts()))
            case "change":
                said.append(text[:at] + draw(st.sampled_from(WORDS)) + text[at + draw(st.integers(0, 3)) :])
            case _:
                said.append(text)
    return said


def stores() -> st.SearchStrategy[PrefixStore]:
    bounds = st.sampled_from([1 << 30, 1 << 30, 20_000, 5_000, 900])
    chunks = st.builds(ChunkStore, bounds, st.sampled_from([1, 2, 3, 7, 16, 64, 256]))
    return st.one_of(chunks, st.builds(TrieStore, bounds))


def encoder(kind: str, store: PrefixStore) -> IncrementalEncoder:
    tokenizer, seams = made(kind)
    # No audits: they would hide what is wrong. Short texts and overlaps, so that small examples reach everything.
    return IncrementalEncoder(Plain(tokenizer), seams, store, kind, text_chars_min=4, overlap_chars=3, audit_every=1 << 60)


@pytest.mark.parametrize("kind", MAKERS)
def test_seams_in_text_are_found_where_they_are_proven(kind: str) -> None:
    seams = made(kind)[1]
    assert seams.text == (kind in IN_TEXT), seams.reasons
    assert "<|im_start|>" in seams.specials


@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.parametrize("kind", MAKERS)
@given(said=turns(), store=stores())
def test_tokens_with_a_store_are_those_of_the_whole_text(kind: str, said: list[str], store: PrefixStore) -> None:
    tokenizer = made(kind)[0]
    incremental = encoder(kind, store)
    for count, text in enumerate(said):
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        assert incremental.encode(text).token_ids.tolist() == whole
        for longer in said[count:]:
            known = incremental.known(longer[: len(text)]).tolist()
            assert known == tokenizer.encode(longer, add_special_tokens=False).ids[: len(known)]
    if kind != "unigram unsplit":
        assert incremental.stats().mismatches == 0


@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.parametrize("kind", MAKERS)
@given(text=texts(), after=texts(), other=texts(), store=stores())
def test_known_tokens_begin_every_continuation(kind: str, text: str, after: str, other: str, store: PrefixStore) -> None:
    tokenizer = made(kind)[0]
    incremental = encoder(kind, store)
    incremental.learn(text + after)
    known = incremental.known(text).tolist()
    for continuation in ("", after, other, *(other[:cut] for cut in range(1, 6))):
        assert known == tokenizer.encode(text + continuation, add_special_tokens=False).ids[: len(known)]


@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.parametrize("kind", MAKERS)
@given(said=st.lists(texts(), min_size=1, max_size=6), count=st.integers(0, 12), margin=st.integers(0, 60))
def test_an_excerpts_tokens_are_those_of_the_whole_text(kind: str, said: list[str], count: int, margin: int) -> None:
    tokenizer, seams = made(kind)
    text = "".join(said)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    first = first_tokens(Plain(tokenizer), seams, text, count, margin_chars=margin).tolist()
    last = last_tokens(Plain(tokenizer), seams, text, count, margin_chars=margin).tolist()
    assert min(count, len(whole)) <= min(len(first), len(last))
    assert first == whole[: len(first)]
    assert last == whole[len(whole) - len(last) :]


@settings(max_examples=EXAMPLES, deadline=None)
@pytest.mark.parametrize("store", [ChunkStore, TrieStore])
@given(data=st.data())
def test_what_a_store_finds_are_tokens_of_one_text_that_was_added(store: Any, data: st.DataObject) -> None:
    """With tokens that depend on what follows, so that texts differ in tokens where they agree in characters."""
    kept = store(
        data.draw(st.sampled_from([1 << 30, 8_000])),
        **({"chunk_chars": data.draw(st.integers(1, 5))} if store is ChunkStore else {}),
    )
    added: list[tuple[str, Encoding]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        text = data.draw(st.text("ab", max_size=24))
        ends = array("I", sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12))))
        encoding = Encoding(array("I", data.draw(st.lists(st.integers(0, 3), min_size=len(ends), max_size=len(ends)))), ends)
        kept.add("s", text, encoding)
        added.append((text, encoding))
        asked = data.draw(st.text("ab", max_size=24))
        for question in (asked, text, text + asked):
            known = kept.find("s", question)
            if known.chars == 0:
                continue
            assert any(
                one.startswith(question[: known.chars])
                and list(zip(known.token_ids, known.ends, strict=True))
                == [(token, end) for token, end in zip(its.token_ids, its.ends, strict=True) if end <= known.chars]
                for one, its in added
            )
