"""A restored index goes on as the one that the snapshot was taken of: random steps, a snapshot, and random steps on both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kvatlas._native")

from kvatlas.errors import SnapshotError
from kvatlas.index import IndexLimits
from kvatlas.index.native import NativeIndex
from kvatlas.keys import KeyRecipe
from kvatlas.types import BlockKey
from tests.models.lockstep import readable
from tests.models.steps import EXAMPLES_FACTOR, SCHEMA, SCHEMAS, Engines, Step, keys_of, picking, step
from tests.models.steps import limits as some_limits

ENGINES = {
    "index blocks": Engines((4,)),
    "index blocks by several names": Engines((4,), "by prefix"),
    "mixed blocks": Engines((4, 4, 8, 2, 6, 3)),
    "mixed blocks by several names": Engines((4, 4, 8, 2, 6, 3), "by prefix"),
    "names at random": Engines((4,), "few"),
    "mixed blocks, names at random": Engines((4, 4, 8, 2, 6, 3), "few"),
}


class Restored:
    """Two indexes, one of them restored from the other; their clocks differ, but go on at one pace."""

    def __init__(self, limits: IndexLimits, clocks_apart_s: float, schema: KeyRecipe = SCHEMA) -> None:
        self.now_s = 0.0
        self.apart_s = clocks_apart_s
        self.limits = limits
        self.original = NativeIndex(schema, limits, lambda: self.now_s)
        self.restored = NativeIndex(schema, limits, lambda: self.now_s + self.apart_s)

    def follow(self, steps: Iterable[Step], *, both: bool) -> None:
        for name, *arguments in steps:
            if name == "advance":
                self.now_s += arguments[0]
            elif name != "fill" and (both or name != "promise"):  # promises are not in a snapshot
                expected = answer(self.original, name, arguments)
                if both:
                    assert answer(self.restored, name, arguments) == expected
                    self.compare()

    def restore(self) -> None:
        self.restored.restore(self.original.snapshot())
        self.compare()

    def compare(self) -> None:
        assert self.restored.streams() == self.original.streams()
        assert sizes(self.restored) == sizes(self.original)

    def look_at_all(self, keys: list[BlockKey]) -> None:
        assert answer(self.restored, "lookup", [keys]) == answer(self.original, "lookup", [keys])
        self.compare()


def answer(index: NativeIndex, name: object, arguments: list[Any]) -> object:
    found = getattr(index, str(name))(*arguments)
    return readable(found) if name == "lookup" else found


def sizes(index: NativeIndex) -> object:
    """Dead records, and sets that nobody has, are not in a snapshot."""
    return msgspec.structs.replace(index.stats(), bytes_estimated=0)


def all_keys(engines: Engines) -> list[BlockKey]:
    roots = ("m", "n", "a", "b", "")
    keys = [keys_of(engines, number, flavour, root) for number in range(16) for flavour in (0, 1) for root in roots]
    return list(dict.fromkeys(key for some in keys for key in some))


@st.composite
def runs(draw: st.DrawFn, engines: Engines) -> tuple[IndexLimits, list[Step], list[Step], float]:
    pick = picking(draw)
    before, after = ([step(pick, engines) for _ in range(draw(st.integers(0, most)))] for most in (30, 20))
    return some_limits(pick), before, after, draw(st.sampled_from([0.0, 64.0, -64.0, 4096.0]))


@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
@settings(max_examples=80 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data())
def test_a_restored_index_goes_on_as_the_original(engines: Engines, data: st.DataObject) -> None:
    """Also in what is evicted next, and when: the order of use and the ages are those of the original."""
    limits, before, after, apart_s = data.draw(runs(engines))
    indexes = Restored(limits, apart_s)
    indexes.follow(before, both=False)
    indexes.restore()
    indexes.follow(after, both=True)
    indexes.look_at_all(all_keys(engines))


@pytest.mark.parametrize("mode", [mode for mode in SCHEMAS if mode != "kvatlas"])
@pytest.mark.parametrize("engines", ENGINES.values(), ids=ENGINES)
@settings(max_examples=30 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data())
def test_one_with_keys_of_another_kind_does_too(engines: Engines, mode: str, data: st.DataObject) -> None:
    modelled = msgspec.structs.replace(engines, schema=SCHEMAS[mode])
    limits, before, after, apart_s = data.draw(runs(modelled))
    indexes = Restored(limits, apart_s, SCHEMAS[mode])
    indexes.follow(before, both=False)
    indexes.restore()
    indexes.follow(after, both=True)
    indexes.look_at_all(all_keys(modelled))


@settings(max_examples=60 * EXAMPLES_FACTOR, deadline=None)
@given(data=st.data())
def test_what_was_changed_by_accident_is_refused(data: st.DataObject) -> None:
    engines = data.draw(st.sampled_from(list(ENGINES.values())))
    limits, before, _, _ = data.draw(runs(engines))
    indexes = Restored(limits, 0.0)
    indexes.follow(before, both=False)
    snapshot = bytearray(indexes.original.snapshot())
    at = data.draw(st.integers(0, len(snapshot) - 1))
    if data.draw(st.booleans()):
        snapshot[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del snapshot[at:]
    empty = sizes(indexes.restored)
    with pytest.raises(SnapshotError):
        indexes.restored.restore(bytes(snapshot))
    assert sizes(indexes.restored) == empty
    indexes.restore()
