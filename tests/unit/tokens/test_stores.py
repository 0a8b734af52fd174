"""Prefix stores: what is found, what is never mixed, bounds; and the encoder that uses them."""

from __future__ import annotations

import random
import sys
import threading
from array import array
from collections.abc import Callable

import pytest

from kvatlas.tokens.encoding import Encoding
from kvatlas.tokens.incremental import IncrementalEncoder
from kvatlas.tokens.seams import Seams
from kvatlas.tokens.stores import Known, PrefixStore
from kvatlas.tokens.stores.chunks import ChunkStore
from kvatlas.tokens.stores.trie import TrieStore

MIB = 1 << 20
MAKERS: dict[str, Callable[[int], PrefixStore]] = {
    "chunks": lambda bytes_max: ChunkStore(bytes_max, 16),
    "trie": TrieStore,
}
either = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Words:
    """Makes each word with the space before it a token, and counts what it was asked."""

    before: array[int] = array("I")
    after: array[int] = array("I")

    def __init__(self) -> None:
        self.chars = 0
        self.wrong = 0

    def encode(self, text: str) -> Encoding:
        self.chars += len(text)
        token_ids, ends = array("I"), array("I")
        at = 0
        while at < len(text):
            end = text.find(" ", at + 1)
            end = len(text) if end < 0 else end
            token_ids.append(sum(map(ord, text[at:end])) + self.wrong)
            ends.append(end)
            at = end
        return Encoding(token_ids, ends)

    def ids(self, text: str) -> array[int]:
        return self.encode(text).token_ids


SEAMS = Seams({}, "A-Za-z", True, ())


def words(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefg", k=rng.randint(2, 8))) for _ in range(count))


def singles(text: str, first: int = 0) -> Encoding:
    return Encoding(array("I", range(first, first + len(text))), array("I", range(1, len(text) + 1)))


def flat(known: Known) -> tuple[list[int], list[int], int]:
    return known.token_ids.tolist(), known.ends.tolist(), known.chars


@either
def test_nothing_is_known_at_first(make: Callable[[int], PrefixStore]) -> None:
    assert flat(make(MIB).find("s", "some text that nobody has added")) == ([], [], 0)


@either
def test_the_prefix_that_two_texts_share_is_found(make: Callable[[int], PrefixStore]) -> None:
    store = make(MIB)
    text = words(60)
    store.add("s", text, singles(text))
    found = store.find("s", text[:100] + "!" * 50)
    assert 96 <= found.chars <= 100
    assert found.token_ids.tolist() == list(range(found.chars))
    assert store.find("s", text).chars >= len(text) - 15


def test_a_trie_knows_to_the_character() -> None:
    store = TrieStore(MIB)
    store.add("s", "a common beginning, one end", singles("a common beginning, one end"))
    store.add("s", "a common beginning, other", singles("a common beginning, other"))
    assert store.find("s", "a common beginning, onX").chars == 22
    assert store.find("s", "a common beginning, other end").chars == 25
    assert store.find("s", "b").chars == 0
    assert store.stats().entries == 3


@either
def test_spaces_share_nothing(make: Callable[[int], PrefixStore]) -> None:
    store = make(MIB)
    text = words(60)
    store.add("one", text, singles(text))
    store.add("two", text, singles(text, 1000))
    assert store.find("one", text).token_ids[0] == 0
    assert store.find("two", text).token_ids[0] == 1000
    store.forget("one")
    assert store.find("one", text).chars == 0
    assert store.find("two", text).chars > 0
    store.forget("two")
    assert (store.stats().entries, store.stats().chars, store.stats().tokens, store.stats().bytes_estimated) == (0, 0, 0, 0)


@pytest.mark.parametrize("store", [ChunkStore(MIB, 4), TrieStore(MIB)])
def test_tokens_of_two_texts_are_not_mixed_where_they_part(store: PrefixStore) -> None:
    """ "abcd|e" and "abcd|f" have other tokens before the place where they part than behind it alone would tell."""
    one = Encoding(array("I", [1, 2]), array("I", [4, 8]))
    other = Encoding(array("I", [3, 4]), array("I", [3, 8]))  # its second token lies across
    store.add("s", "abcdefgh", one)
    store.add("s", "abcdXYZ.", other)
    assert flat(store.find("s", "abcdefgh")) == ([1, 2], [4, 8], 8)
    assert flat(store.find("s", "abcdXYZ.")) == ([3, 4], [3, 8], 8)


@either
def test_the_bound_holds_and_what_was_used_last_stays(make: Callable[[int], PrefixStore]) -> None:
    store = make(60_000)
    kept = words(60, seed=1)
    store.add("s", kept, singles(kept))
    for seed in range(2, 60):
        text = words(60, seed=seed)
        store.add("s", text, singles(text))
        assert store.stats().bytes_estimated <= 60_000
        assert store.find("s", kept).chars >= len(kept) - 15
    assert store.stats().evicted > 0
    assert store.find("s", words(60, seed=2)).chars < 20


@either
def test_a_text_above_the_bound_does_no_harm(make: Callable[[int], PrefixStore]) -> None:
    store = make(3_000)
    text = words(5_000)
    store.add("s", text, singles(text))
    assert store.stats().bytes_estimated <= 3_000
    found = store.find("s", text)
    assert found.token_ids.tolist() == list(range(found.chars))


@either
def test_lone_surrogates_are_text_like_any(make: Callable[[int], PrefixStore]) -> None:
    store = make(MIB)
    text = "\ud800" * 64
    store.add("s", text, singles(text))
    assert store.find("s", text).chars == 64


def test_a_deep_tree_is_walked_evicted_and_forgotten() -> None:
    store = TrieStore(1 << 34)
    text = "ab" * 1_000
    for length in range(1, len(text)):
        store.add("s", text[:length], singles(text[:length]))
    assert store.stats().entries == len(text) - 1
    assert store.find("s", text).token_ids.tolist() == list(range(len(text) - 1))
    store._bytes_max = 500_000
    store.add("s", "other", singles("other"))
    assert store.stats().bytes_estimated <= 500_000
    assert 0 < store.find("s", text).chars < len(text)
    store.forget("s")
    assert store.stats().entries == 0


def deep_size(value: object, seen: set[int]) -> int:
    """Bytes of an object with all that only it holds."""
    if id(value) in seen or isinstance(value, (type, type(threading.Lock()))) or value is None:
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(deep_size(key, seen) + deep_size(item, seen) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return size + sum(deep_size(item, seen) for item in value)
    slots = getattr(type(value), "__slots__", None)
    if slots and type(value).__module__.startswith("kvatlas"):
        return size + sum(deep_size(getattr(value, name), seen) for name in slots if name != "parent")
    return size


@pytest.mark.parametrize("chars", [40, 400, 4_000])
@pytest.mark.parametrize("kind", ["chunks", "trie"])
def test_estimated_bytes_are_close_to_those_held(kind: str, chars: int) -> None:
    store = ChunkStore(1 << 30, max(16, chars // 10)) if kind == "chunks" else TrieStore(1 << 30)
    for seed in range(300):
        text = f"{seed:04}" + words(chars // 4, seed=seed)[:chars]
        store.add("s" * 20, text, Words().encode(text))
    held = deep_size(store._chunks if isinstance(store, ChunkStore) else [store._roots, store._leaves], set())
    assert 0.85 < store.stats().bytes_estimated / held < 1.25


def test_estimated_bytes_of_a_chain_of_nodes_are_close_to_those_held() -> None:
    store = TrieStore(1 << 30)
    text = words(2_000)
    for length in range(20, len(text), 20):
        store.add("s", text[:length], Words().encode(text[:length]))
    nodes, node = [], store._roots["s"]
    while node.children:
        node = next(iter(node.children.values()))
        nodes.append(node)
    held = sum(
        deep_size([getattr(node, name) for name in ("edge", "token_ids", "ends", "used", "size_bytes")], set())
        for node in nodes
    )
    held += sum(sys.getsizeof(node) + sys.getsizeof(node.children) for node in nodes)
    held += deep_size([item[:2] for item in store._leaves], set())
    assert 0.85 < store.stats().bytes_estimated / held < 1.25


@either
def test_threads_may_use_a_store_together(make: Callable[[int], PrefixStore]) -> None:
    store = make(30_000)
    failures: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            text = words(40, seed=rng.randrange(8))[: rng.randrange(1, 200)]
            store.add("s", text, singles(text))
            found = store.find("s", text)
            if found.token_ids.tolist() != list(range(found.chars)):
                failures.append(text)
            if rng.random() < 0.02:
                store.forget("s")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.stats().bytes_estimated <= 30_000


@pytest.mark.parametrize(("bytes_max", "chunk_chars"), [(0, 1), (1, 0)])
def test_bounds_of_nothing_are_refused(bytes_max: int, chunk_chars: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ChunkStore(bytes_max, chunk_chars)


@either
def test_only_the_rest_of_a_known_text_is_tokenized(make: Callable[[int], PrefixStore]) -> None:
    tokenizer = Words()
    encoder = IncrementalEncoder(tokenizer, SEAMS, make(MIB), "s", audit_every=1 << 60)
    encoder._stats.assisted = 1  # the first one would be audited
    text = words(2_000)
    encoder.learn(text)
    tokenizer.chars = 0
    longer = text + " and some more words"
    result = encoder.encode(longer)
    assert tokenizer.chars < 400
    assert result.token_ids == Words().encode(longer).token_ids
    assert result.tokens_stored > 1_900
    assert encoder.stats().mismatches == 0


@either
def test_stored_tokens_that_differ_are_not_used(make: Callable[[int], PrefixStore]) -> None:
    tokenizer = Words()
    encoder = IncrementalEncoder(tokenizer, SEAMS, make(MIB), "s")
    text = words(500)
    encoder.learn(text)
    tokenizer.wrong = 1
    assert encoder.encode(text + " more of it").token_ids == tokenizer.encode(text + " more of it").token_ids
    assert encoder.stats().mismatches == 1


class Counting(Words):
    """Its tokens depend on how many words there are: no seam of it is true."""

    def encode(self, text: str) -> Encoding:
        encoding = super().encode(text)
        if len(text) > 3_000:
            encoding.token_ids[0] = len(encoding.token_ids)
        return encoding


@either
def test_a_failed_audit_turns_the_store_off_and_says_why(make: Callable[[int], PrefixStore]) -> None:
    tokenizer = Counting()
    store = make(MIB)
    encoder = IncrementalEncoder(tokenizer, SEAMS, store, "s")
    text = words(1_000)
    encoder.learn(text)
    assert encoder.off is None
    assert encoder.encode(text + " and more").token_ids == Counting().encode(text + " and more").token_ids
    assert (encoder.stats().audits, encoder.stats().audit_failures) == (1, 1)
    assert encoder.off is not None
    assert "audit" in encoder.off
    assert store.stats().entries == 0
    assert encoder.encode(text).tokens_stored == 0
    assert not encoder.known(text)


def test_one_result_in_many_is_audited() -> None:
    encoder = IncrementalEncoder(Words(), SEAMS, TrieStore(MIB), "s", audit_every=8)
    text = words(500)
    encoder.learn(text)
    for _ in range(17):
        encoder.encode(text)
    assert encoder.stats().audits == 3
    assert encoder.stats().assisted == 17


def test_short_texts_are_left_alone() -> None:
    store = TrieStore(MIB)
    encoder = IncrementalEncoder(Words(), SEAMS, store, "s")
    encoder.encode("a few words")
    assert store.stats().entries == 0


def test_without_seams_a_store_is_off() -> None:
    encoder = IncrementalEncoder(Words(), Seams.none("unknown"), TrieStore(MIB), "s")
    assert encoder.off == "unknown"
    assert encoder.encode(words(500)).tokens_stored == 0


def test_ends_that_fall_are_not_stored() -> None:
    class Falling(Words):
        def encode(self, text: str) -> Encoding:
            encoding = super().encode(text)
            encoding.ends.reverse()
            return encoding

    store = TrieStore(MIB)
    IncrementalEncoder(Falling(), SEAMS, store, "s").encode(words(500))
    assert store.stats().entries == 0
