"""What every index must do, one behaviour a test."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from typing import TypeVar

import pytest

from kvatlas.index import Index, IndexLimits
from kvatlas.index.protocol import PLACES_MAX
from kvatlas.keys import EngineKeys, HashScheme, KeyRecipe, KeySchema, LlmdKeys
from kvatlas.keys.engine_hashes import UNSET_SEED
from kvatlas.types import (
    CPU,
    DISK,
    GPU,
    STORAGE,
    AllBlocksCleared,
    ApplyReport,
    AttentionKind,
    BlockKey,
    BlockRemoved,
    BlockStored,
    DpRank,
    EngineHash,
    Event,
    EventBatch,
    Extra,
    GroupIdx,
    GroupSpec,
    PodId,
    Slot,
    StaleReason,
    Stream,
    Tier,
)
from tests.contract.implementations import IMPLEMENTATIONS, MakeIndex

SIZE = 4
RECIPES: dict[str, KeyRecipe] = {
    "kvatlas": KeySchema(SIZE),
    "engine": EngineKeys(HashScheme("sha256_cbor", UNSET_SEED), SIZE),
    "llmd": LlmdKeys(SIZE),
}
SCHEMA: KeyRecipe = RECIPES["kvatlas"]
"""That of the test: all run with each."""
ONE, TWO = Stream(PodId("one")), Stream(PodId("two"))


T = TypeVar("T", bound=Callable[..., object])


def chained(test: T) -> T:
    """Mark a test of what follows from tokens and parents: where keys are engine hashes it means nothing."""
    test.chained = True  # type: ignore[attr-defined]
    return test


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [name for name in RECIPES if name != "engine" or not hasattr(metafunc.function, "chained")]
    metafunc.parametrize("recipe", names, indirect=True)


@pytest.fixture(autouse=True)
def recipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SCHEMA", RECIPES[request.param])


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def make(request: pytest.FixtureRequest) -> MakeIndex:
    return request.param


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def index(make: MakeIndex, clock: Clock) -> Index:
    return make(SCHEMA, IndexLimits(), clock)


def tokens_of(prompt: str) -> array[int]:
    """A prompt is a word: each letter is a block."""
    return array("I", [ord(letter) for letter in prompt for _ in range(SIZE)])


def keys_of(prompt: str, **what: object) -> list[BlockKey]:
    return SCHEMA.keys(tokens_of(prompt), "m", **what)


def hashes_of(prompt: str) -> tuple[EngineHash, ...]:
    if isinstance(SCHEMA, EngineKeys):
        return tuple(map(EngineHash, keys_of(prompt)))
    return tuple(EngineHash(hash(prompt[: i + 1]) & (2**64 - 1)) for i in range(len(prompt)))


def stored(prompt: str, after: str = "", tier: Tier = GPU, **more: object) -> BlockStored:
    """The blocks of ``prompt`` that follow its beginning ``after``."""
    fresh = prompt[len(after) :]
    parent = hashes_of(after)[-1] if after else None
    return BlockStored(hashes_of(prompt)[len(after) :], parent, tokens_of(fresh), SIZE, tier, **more)


def placeholder(prompt: str, tier: Tier) -> BlockStored:
    return BlockStored(hashes_of(prompt)[-1:], tier=tier)


def removed(prompt: str, tier: Tier = GPU, group: int | None = 0) -> BlockRemoved:
    return BlockRemoved(hashes_of(prompt)[-1:], tier, None if group is None else GroupIdx(group))


def apply(index: Index, stream: Stream, *events: Event) -> ApplyReport:
    return index.apply(stream, EventBatch(events, model="m"))


def copies(index: Index, prompt: str, **what: object) -> list[dict[Slot, int]]:
    return [dict(slots) for slots in index.lookup(keys_of(prompt, **what)).holders]


def blocks_held(index: Index, prompt: str) -> int:
    return sum(1 for slots in copies(index, prompt) if slots)


def test_a_stored_block_is_found_where_it_lies(index: Index) -> None:
    apply(index, ONE, stored("ab"))
    apply(index, TWO, stored("a"))
    assert copies(index, "abc") == [{Slot(ONE): 1, Slot(TWO): 1}, {Slot(ONE): 1}, {}]


def test_lookups_of_named_pods_tell_of_those_only(index: Index) -> None:
    apply(index, ONE, stored("a"))
    apply(index, TWO, stored("a"))
    lookup = index.lookup(keys_of("a"), {TWO.pod})
    assert dict(lookup.holders[0]) == {Slot(TWO): 1}
    assert set(lookup.streams) == {TWO}


def test_a_block_announced_twice_is_gone_after_the_second_removal(index: Index) -> None:
    report = apply(index, ONE, stored("ab"), stored("ab", after="a"))
    assert (report.stored, report.duplicates) == (3, 1)
    apply(index, ONE, removed("ab"))
    assert copies(index, "ab")[1] == {Slot(ONE): 1}
    apply(index, ONE, removed("ab"))
    assert copies(index, "ab") == [{Slot(ONE): 1}, {}]


def test_removing_what_is_not_held_is_counted_and_changes_nothing(index: Index) -> None:
    apply(index, ONE, stored("a"))
    report = apply(index, ONE, removed("zz"), removed("a", CPU), removed("a", group=1))
    assert report.removed_unknown == 3
    assert copies(index, "a") == [{Slot(ONE): 1}]


def test_a_removal_without_group_means_every_group(index: Index) -> None:
    apply(index, ONE, stored("a"), stored("a", group=GroupIdx(1)))
    apply(index, ONE, removed("a", group=None))
    assert copies(index, "a") == [{}]


def test_ranks_are_caches_of_their_own(index: Index) -> None:
    other = Stream(ONE.pod, DpRank(1))
    apply(index, ONE, stored("a"))
    apply(index, other, stored("ab"))
    apply(index, ONE, AllBlocksCleared())
    assert copies(index, "ab") == [{Slot(other): 1}, {Slot(other): 1}]


def test_a_clear_without_medium_empties_the_device_only(index: Index) -> None:
    apply(index, ONE, stored("a"), stored("a", tier=CPU))
    report = apply(index, ONE, AllBlocksCleared())
    assert report.cleared == 1
    assert copies(index, "a") == [{Slot(ONE, CPU): 1}]


def test_a_clear_with_a_medium_empties_that_one(index: Index) -> None:
    apply(index, ONE, stored("a"), stored("a", tier=CPU), stored("a", tier=STORAGE))
    apply(index, ONE, AllBlocksCleared(CPU))
    assert copies(index, "a") == [{Slot(ONE): 1, Slot(ONE, STORAGE): 1}]


def test_an_unknown_medium_keeps_its_name(index: Index) -> None:
    apply(index, ONE, stored("a", tier=Tier("tape")))
    assert copies(index, "a") == [{Slot(ONE, Tier("tape")): 1}]


def test_a_placeholder_is_known_by_its_engine_hash_even_after_the_device_let_go_of_the_block(index: Index) -> None:
    apply(index, ONE, stored("ab"), removed("ab"), placeholder("ab", CPU))
    assert copies(index, "ab")[1] == {Slot(ONE, CPU): 1}


@chained
def test_a_placeholder_that_comes_first_waits_as_an_orphan(index: Index) -> None:
    report = apply(index, ONE, placeholder("a", CPU))
    assert report.orphaned == 1
    assert index.stats().orphans == 1
    report = apply(index, ONE, stored("a"))
    assert report.adopted == 1
    assert index.stats().orphans == 0
    assert copies(index, "a") == [{Slot(ONE): 1, Slot(ONE, CPU): 1}]


@chained
def test_children_of_an_unknown_parent_are_adopted_when_it_comes(index: Index) -> None:
    apply(index, ONE, stored("abcd", after="abc"), stored("abc", after="a"))
    assert index.stats().orphans == 3
    assert blocks_held(index, "abcd") == 0
    report = apply(index, ONE, stored("a"))
    assert report.adopted == 3
    assert blocks_held(index, "abcd") == 4


@chained
def test_a_long_chain_of_orphans_is_adopted_without_recursion(index: Index) -> None:
    chain = "".join(chr(97 + i % 26) for i in range(5000))
    hashes = tuple(EngineHash(i + 1) for i in range(5000))
    tokens = tokens_of(chain)
    for i in range(4999, 0, -1):
        block = tokens[i * SIZE : (i + 1) * SIZE]
        apply(index, ONE, BlockStored(hashes[i : i + 1], hashes[i - 1], block, SIZE))
    apply(index, ONE, BlockStored(hashes[:1], None, tokens[:SIZE], SIZE))
    assert blocks_held(index, chain) == 5000


def test_an_orphan_that_is_removed_before_it_is_named_leaves_nothing(index: Index) -> None:
    apply(index, ONE, placeholder("a", CPU), removed("a", CPU), stored("a"), removed("a"))
    assert copies(index, "a") == [{}]
    assert index.stats().orphans == 0


@chained
def test_a_block_that_got_its_keys_waits_for_its_parent_no_longer(make: MakeIndex, clock: Clock) -> None:
    index = make(SCHEMA, IndexLimits(retired_max=0), clock)
    block, one_parent, other_parent = EngineHash(1), EngineHash(2), EngineHash(3)

    def after(parent: EngineHash | None, block: EngineHash = block) -> BlockStored:
        return BlockStored((block,), parent, tokens_of("a"), SIZE)

    assert apply(index, ONE, after(one_parent)).orphaned == 1
    assert apply(index, ONE, after(None)).adopted == 1
    apply(index, ONE, *[BlockRemoved((block,), GPU, GroupIdx(0))] * 2)
    assert apply(index, ONE, after(other_parent)).orphaned == 1
    assert apply(index, ONE, after(None, one_parent)).adopted == 0
    assert apply(index, ONE, after(None, other_parent)).adopted == 1


@chained
def test_orphans_are_bounded_and_counted(make: MakeIndex, clock: Clock) -> None:
    index = make(SCHEMA, IndexLimits(orphans_max=10), clock)
    report = ApplyReport()
    for i in range(25):
        report.add(apply(index, ONE, placeholder(chr(97 + i), CPU)))
    assert report.orphans_dropped == 15
    assert index.stats().orphans == 10
    apply(index, ONE, *(stored(chr(97 + i)) for i in range(25)))
    assert Slot(ONE, CPU) not in copies(index, "a")[0]
    assert Slot(ONE, CPU) in copies(index, "y")[0]


def test_a_sliding_window_event_names_fewer_blocks_than_it_has_tokens(index: Index) -> None:
    """vLLM's sliding groups come first and list what they keep; the full-attention event of the batch tells which those are."""
    spec = GroupSpec(block_size_tokens=SIZE)
    kept = hashes_of("abcd")[2:]
    sliding = BlockStored(kept, None, tokens_of("abcd"), SIZE, group=GroupIdx(1))
    empty = BlockStored((), None, tokens_of("abcd"), SIZE, group=GroupIdx(2))
    apply(index, ONE, sliding, empty, stored("abcd", spec=spec))
    groups = [sorted(slot.group for slot in slots) for slots in copies(index, "abcd")]
    assert groups == [[0], [0], [0, 1], [0, 1]]


def test_groups_are_learnt_from_events(index: Index) -> None:
    spec = GroupSpec(block_size_tokens=SIZE)
    apply(index, ONE, stored("a", spec=spec), placeholder("a", CPU))
    assert index.streams()[ONE].groups == {GroupIdx(0): spec}
    assert index.streams()[ONE].model == "m"


@chained
def test_extra_keys_tell_blocks_apart_and_an_adapter_is_a_model_of_its_own(index: Index) -> None:
    salted = BlockStored((EngineHash(1),), None, tokens_of("a"), SIZE, extras=((Extra(0, "salt", b"s"),),))
    lora = BlockStored((EngineHash(2),), None, tokens_of("a"), SIZE, lora_name="adapter")
    apply(index, ONE, salted, lora)
    assert copies(index, "a") == [{}]
    assert copies(index, "a", cache_salt="s") == [{Slot(ONE): 1}]
    assert copies(index, "a", lora_name="adapter") == [{Slot(ONE): 1}]


def test_dropping_a_stream_leaves_the_others(index: Index) -> None:
    apply(index, ONE, stored("abc"), stored("ab", tier=CPU))
    apply(index, TWO, stored("ab"))
    assert index.drop(ONE) == 5
    assert copies(index, "abc") == [{Slot(TWO): 1}, {Slot(TWO): 1}, {}]
    assert ONE in index.streams()
    assert index.streams()[ONE].blocks == 0
    assert index.drop(ONE) == 0


def test_a_stream_can_start_again_after_a_drop(index: Index) -> None:
    apply(index, ONE, stored("abc"))
    index.drop(ONE)
    apply(index, ONE, stored("ab"))
    assert copies(index, "abc") == [{Slot(ONE): 1}, {Slot(ONE): 1}, {}]


def test_forgetting_a_stream_leaves_no_trace(index: Index) -> None:
    apply(index, ONE, stored("abc"))
    index.forget(ONE)
    stats = index.stats()
    assert (stats.blocks, stats.entries, stats.streams, stats.pods, stats.bytes_estimated) == (0, 0, 0, 0, 0)
    assert index.forget(ONE) == 0


def test_a_mark_is_seen_in_every_answer_until_it_is_taken_back(index: Index) -> None:
    apply(index, ONE, stored("a"))
    index.mark(ONE, StaleReason.GAP)
    assert index.lookup(keys_of("a")).streams[ONE].stale is StaleReason.GAP
    index.mark(ONE, None)
    assert index.streams()[ONE].stale is None


def test_blocks_not_stored_or_asked_for_within_the_ttl_go(make: MakeIndex, clock: Clock) -> None:
    index = make(SCHEMA, IndexLimits(ttl_s=100), clock)
    apply(index, ONE, stored("ab"), stored("z"))
    clock.now_s = 60
    index.lookup(keys_of("ab"))
    clock.now_s = 120
    assert index.expire() == 1
    assert blocks_held(index, "ab") == 2
    assert blocks_held(index, "z") == 0
    assert index.stats().evicted_ttl == 1


def test_the_least_recently_used_block_goes_first_and_a_prefix_from_its_end(make: MakeIndex, clock: Clock) -> None:
    index = make(SCHEMA, IndexLimits(blocks_max=5), clock)
    apply(index, ONE, stored("abc"))
    apply(index, ONE, stored("xy"))
    index.lookup(keys_of("abc"))
    apply(index, ONE, stored("mn"))
    assert [blocks_held(index, prompt) for prompt in ("abc", "xy", "mn")] == [3, 0, 2]
    apply(index, ONE, stored("o"))
    index.lookup(keys_of("mn"))
    assert index.stats().blocks == 5
    assert [bool(slots) for slots in copies(index, "abc")] == [True, True, False]
    assert index.stats().evicted_size == 3


def test_an_evicted_block_can_be_stored_again_and_its_removal_is_harmless(make: MakeIndex, clock: Clock) -> None:
    index = make(SCHEMA, IndexLimits(blocks_max=1), clock)
    apply(index, ONE, stored("a"))
    apply(index, ONE, stored("b"))
    assert apply(index, ONE, removed("a")).removed_unknown == 1
    apply(index, ONE, stored("a"))
    assert blocks_held(index, "a") == 1


@pytest.mark.parametrize("bytes_max", [50_000, 200_000])
def test_bytes_are_bounded_whatever_is_stored(make: MakeIndex, clock: Clock, bytes_max: int) -> None:
    index = make(SCHEMA, IndexLimits(bytes_max=bytes_max), clock)
    for i in range(2500):
        prompt = chr(1000 + i)
        kinds = [stored(prompt * 3), placeholder(prompt + "q", CPU), stored(prompt * 3, tier=CPU), removed(prompt * 3)]
        apply(index, Stream(PodId(f"pod {i % 7}")), *kinds)
        assert index.stats().bytes_estimated <= bytes_max
    assert index.stats().evicted_bytes > 0
    assert index.stats().blocks > 0


@chained
def test_bytes_are_bounded_where_no_block_has_a_key_yet(make: MakeIndex, clock: Clock) -> None:
    index = make(KeySchema(2 * SIZE), IndexLimits(bytes_max=20_000), clock)
    for i in range(200):
        apply(index, ONE, stored(chr(1000 + i)))
    index.promise(TWO, [BlockKey(i) for i in range(200)], 5.0)
    apply(index, ONE, stored("a"))
    assert index.stats().bytes_estimated <= 20_000


@chained
def test_blocks_held_nowhere_are_remembered_in_two_generations(make: MakeIndex, clock: Clock) -> None:
    index = make(SCHEMA, IndexLimits(retired_max=4), clock)
    apply(index, ONE, *(stored(letter) for letter in "abcd"), *(removed(letter) for letter in "abcd"))
    report = apply(index, ONE, *(placeholder(letter, CPU) for letter in "abcd"))
    assert report.orphaned == 2
    assert [blocks_held(index, prompt) for prompt in "abcd"] == [0, 0, 1, 1]


@chained
def test_a_clear_that_retires_more_than_is_remembered_forgets_them(make: MakeIndex, clock: Clock) -> None:
    index = make(SCHEMA, IndexLimits(retired_max=4), clock)
    apply(index, ONE, stored("abcde"), AllBlocksCleared())
    assert apply(index, ONE, placeholder("a", CPU)).orphaned == 1
    apply(index, TWO, stored("abcd"), AllBlocksCleared())
    assert apply(index, TWO, placeholder("a", CPU)).orphaned == 0


def test_places_beyond_a_bound_are_refused_and_counted(index: Index) -> None:
    report = apply(index, ONE, *(stored("a", group=GroupIdx(group)) for group in range(PLACES_MAX + 2)))
    assert (report.stored, report.refused) == (PLACES_MAX, 2)
    assert len(copies(index, "a")[0]) == PLACES_MAX
    assert apply(index, ONE, stored("b")).refused == 0


def test_groups_beyond_a_bound_are_not_learnt(index: Index) -> None:
    spec = GroupSpec(AttentionKind.FULL, None, SIZE)
    apply(index, ONE, *[stored("a", group=GroupIdx(number), spec=spec) for number in range(PLACES_MAX + 10)])
    assert len(index.streams()[ONE].groups) == PLACES_MAX


def test_an_engine_that_names_very_many_tiers_leaves_the_usual_ones_to_others(index: Index) -> None:
    apply(index, ONE, *[stored("a", tier=Tier(f"tier-{number}")) for number in range(PLACES_MAX + 10)])
    for tier in (GPU, CPU, DISK, STORAGE):
        assert apply(index, TWO, stored("a", tier=tier)).refused == 0


def test_a_promise_holds_until_its_time_is_up_or_the_event_comes(index: Index, clock: Clock) -> None:
    index.promise(ONE, keys_of("ab"), 2.0)
    assert [set(promised) for promised in index.lookup(keys_of("abc")).speculative] == [{ONE}, {ONE}, set()]
    apply(index, ONE, stored("a"))
    lookup = index.lookup(keys_of("ab"))
    assert [set(promised) for promised in lookup.speculative] == [set(), {ONE}]
    clock.now_s = 2.5
    assert index.stats().speculative == 1
    index.expire()
    assert index.stats().speculative == 0


def test_a_promise_of_what_is_held_changes_nothing_and_promises_are_bounded(make: MakeIndex, clock: Clock) -> None:
    index = make(SCHEMA, IndexLimits(promises_max=3), clock)
    apply(index, ONE, stored("a"))
    index.promise(ONE, keys_of("a"), 2.0)
    assert index.stats().speculative == 0
    index.promise(TWO, keys_of("abcdef"), 2.0)
    assert index.stats().speculative == 3


def test_a_promise_to_a_stream_that_was_not_heard_of_lists_it(index: Index) -> None:
    index.promise(TWO, keys_of("a"), 2.0)
    assert set(index.lookup(keys_of("ab")).streams) == {TWO}
    assert set(index.lookup(keys_of("b")).streams) == set()
    assert index.stats().streams == 0


def test_a_promise_may_be_renewed(index: Index, clock: Clock) -> None:
    index.promise(ONE, keys_of("a"), 2.0)
    clock.now_s = 1.5
    index.promise(ONE, keys_of("a"), 2.0)
    clock.now_s = 3.0
    assert set(index.lookup(keys_of("a")).speculative[0]) == {ONE}


def test_stats_count_what_is_there(index: Index) -> None:
    apply(index, ONE, stored("ab"), stored("a", tier=CPU))
    apply(index, TWO, stored("a"))
    stats = index.stats()
    assert (stats.blocks, stats.entries, stats.streams, stats.pods) == (2, 4, 2, 2)
    assert stats.bytes_estimated > 0


# -- keys that are engine hashes ------------------------------------------------------------------------------------------


@pytest.fixture
def by_hash(make: MakeIndex, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setattr(sys.modules[__name__], "SCHEMA", RECIPES["engine"])
    return make(SCHEMA, IndexLimits(), clock)


def test_a_block_is_held_under_its_hash_without_tokens_and_without_a_parent(by_hash: Index) -> None:
    report = apply(by_hash, ONE, placeholder("abc", CPU), placeholder("ab", STORAGE), stored("a"))
    assert (report.stored, report.orphaned, report.adopted) == (3, 0, 0)
    assert copies(by_hash, "abc") == [{Slot(ONE): 1}, {Slot(ONE, STORAGE): 1}, {Slot(ONE, CPU): 1}]
    assert apply(by_hash, ONE, removed("abc", CPU), removed("abc", CPU)).removed_unknown == 1
    assert copies(by_hash, "abc")[2] == {}


def test_what_an_event_says_of_a_blocks_content_is_not_looked_at(by_hash: Index) -> None:
    one, two, _ = hashes_of("abc")
    extras = ((Extra(0, "mm", b"i"),), ())
    apply(by_hash, ONE, BlockStored((one, two), EngineHash(99), tokens_of("zz"), SIZE, lora_name="x", extras=extras))
    assert copies(by_hash, "ab") == [{Slot(ONE): 1}, {Slot(ONE): 1}]


def test_a_hash_that_comes_twice_in_an_event_is_two_copies(by_hash: Index) -> None:
    one, two = hashes_of("ab")
    assert apply(by_hash, ONE, BlockStored((one, two, one, two, *hashes_of("z")))).duplicates == 2
    assert copies(by_hash, "abz")[:2] == [{Slot(ONE): 2}, {Slot(ONE): 2}]
    assert blocks_held(by_hash, "z") == 1


@pytest.mark.parametrize("size", [SIZE // 2, 2 * SIZE])
def test_blocks_of_another_size_are_refused_and_counted(by_hash: Index, size: int) -> None:
    spec = GroupSpec(block_size_tokens=size)
    report = apply(by_hash, ONE, BlockStored(hashes_of("ab"), None, tokens_of("ab"), size, spec=spec))
    assert (report.stored, report.refused, report.orphaned) == (0, 2, 0)
    assert copies(by_hash, "ab") == [{}, {}]
    assert by_hash.streams()[ONE].groups == {GroupIdx(0): spec}, "who looks for the reason sees the engine's size"
    assert apply(by_hash, ONE, BlockRemoved(hashes_of("ab"))).removed_unknown == 2
    assert apply(by_hash, ONE, BlockStored(hashes_of("ab"), block_size_tokens=0)).stored == 2, "a placeholder tells no size"
