"""The tree of hot prefixes: what prompts had in common, within bounds."""

from __future__ import annotations

import random
from array import array

from kvatlas.serve.dashboard import prefixes
from kvatlas.serve.dashboard.prefixes import HALF_LIFE_S, KEYS_MAX, NODES_MAX, HotPrefixes, Prefix
from kvatlas.types import BlockKey


def chain(*parts: tuple[int, int]) -> list[BlockKey]:
    """Return keys as chained ones are: those of a part depend on the parts before."""
    keys: list[BlockKey] = []
    seed = 0
    for name, blocks in parts:
        for number in range(blocks):
            seed = hash((seed, name, number)) & 0xFFFF_FFFF_FFFF_FFFF
            keys.append(BlockKey(seed))
    return keys


def runs(found: list[Prefix]) -> dict[tuple[int, int], float]:
    return {(one.start_blocks, one.end_blocks): one.requests for one in found}


def test_what_prompts_have_in_common_is_one_node() -> None:
    hot = HotPrefixes()
    for question in range(4):
        hot.offer("m", array("Q", chain((1, 30), (100 + question, 5))), 30)
    hot.fold(0.0)
    (one,) = hot.top(10)
    assert (one.start_blocks, one.end_blocks, one.requests) == (0, 30, 4.0)
    assert one.key == chain((1, 30))[-1]
    assert one.held_blocks == 120.0
    assert (one.model, one.parent) == ("m", None)


def test_branches_stand_below_what_they_share() -> None:
    hot = HotPrefixes()
    for branch in (7, 8):
        for question in range(3):
            hot.offer("m", chain((1, 10), (branch, 20), (100 * branch + question, 3)), 0)
    hot.fold(0.0)
    found = hot.top(10)
    assert runs(found) == {(0, 10): 6.0, (10, 30): 3.0}
    root = next(one for one in found if one.start_blocks == 0)
    assert [one.parent for one in found if one.start_blocks == 10] == [root.id, root.id]


def test_a_prompt_that_ends_within_another_cuts_it_there() -> None:
    hot = HotPrefixes()
    for blocks in (20, 8, 20, 8):
        hot.offer("m", chain((1, blocks)), blocks)
    hot.fold(0.0)
    assert runs(hot.top(10)) == {(0, 8): 4.0, (8, 20): 2.0}


def test_what_was_held_is_kept_apart_when_a_node_is_cut() -> None:
    hot = HotPrefixes()
    hot.offer("m", chain((1, 20)), 12)
    hot.offer("m", chain((1, 20)), 12)
    hot.offer("m", chain((1, 10), (2, 4)), 10)
    hot.offer("m", chain((1, 10), (2, 4)), 10)
    hot.fold(0.0)
    held = {(one.start_blocks, one.end_blocks): one.held_blocks for one in hot.top(10)}
    assert held == {(0, 10): 40.0, (10, 20): 4.0, (10, 14): 0.0}


def test_models_do_not_mix() -> None:
    hot = HotPrefixes()
    for model in ("a", "b"):
        for _ in range(2):
            hot.offer(model, chain((1, 5)), 0)
    hot.fold(0.0)
    assert sorted(one.model for one in hot.top(10)) == ["a", "b"]


def test_a_single_request_is_not_shown_and_old_ones_fade() -> None:
    hot = HotPrefixes()
    hot.offer("m", chain((1, 5)), 0)
    hot.fold(0.0)
    assert hot.top(10) == []
    for _ in range(3):
        hot.offer("m", chain((1, 5)), 0)
    hot.fold(HALF_LIFE_S)
    assert runs(hot.top(10)) == {(0, 5): 3.5}
    hot.fold(10 * HALF_LIFE_S)
    assert hot.top(10) == []


def test_of_a_rush_a_sample_counts_for_all() -> None:
    hot = HotPrefixes()
    for _ in range(4 * prefixes.SAMPLES_MAX):
        hot.offer("m", chain((1, 2)), 0)
    hot.fold(0.0)
    (one,) = hot.top(10)
    assert one.requests == 4 * prefixes.SAMPLES_MAX


def test_shown_nodes_come_with_all_above_them_and_are_no_more_than_asked_for() -> None:
    hot = HotPrefixes()
    for branch in range(30):
        for _ in range(2):
            hot.offer("m", chain((1, 2), (10 + branch, 40)), 0)
    hot.fold(0.0)
    found = hot.top(12)
    assert len(found) == 12
    numbers = {one.id for one in found}
    assert all(one.parent is None or one.parent in numbers for one in found)


def test_the_tree_stays_within_its_bounds_whatever_comes() -> None:
    random_source = random.Random(11)
    hot = HotPrefixes()
    for _ in range(60):
        for _ in range(200):
            shared = random_source.randrange(40)
            hot.offer("m", array("Q", chain((shared, 50), (random_source.getrandbits(30), 60))), 0)
        hot.fold(2.0)
        assert hot._nodes <= NODES_MAX
        assert hot._keys <= KEYS_MAX
    nodes = [node for root in hot._roots.values() for node in root.below()]
    assert len(nodes) == hot._nodes
    assert sum(len(node.run) for node in nodes) == hot._keys
    assert {(one.start_blocks, one.end_blocks) for one in hot.top(40)} == {(0, 50)}
