"""What the native core is given by mistake is refused with a plain Python exception, and leaves the index as it was."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvatlas.keys import KeySchema

_native = pytest.importorskip("kvatlas._native", reason="the native core is not built")

LIMITS: dict[str, Any] = {
    "ttl_s": 10.0,
    "blocks_max": 100,
    "bytes_max": 1 << 30,
    "orphans_max": 100,
    "retired_max": 100,
    "promises_max": 100,
}
QUESTION = (None, None, "longest-prefix", [("gpu", 1.0)], 0.1, 1.0)
ROOT = KeySchema(4).root("").key
STORED = ([1, 2], None, array("I", range(8)), 4, "gpu", 0, None, None, None)
REFUSED = (TypeError, ValueError, OverflowError, BufferError, NotImplementedError)


def make(block_size_tokens: Any = 4, seed: Any = "", **limits: Any) -> Any:
    return _native.Core(block_size_tokens, seed, **{**LIMITS, **limits})


@pytest.fixture
def core() -> Iterator[Any]:
    """An index with two blocks, which still has them, and still answers, after whatever the test did."""
    core = make()
    core.apply("pod", 0, [STORED], None, 1.5, 0.0)
    stats = core.stats()
    yield core
    assert core.stats() == stats
    assert core.score_tokens(array("I", range(9)), ROOT, [], QUESTION, 0.0).to_dict() == {"pod": 2}
    report = core.apply("pod", 0, [([1, 2], "gpu", None)], None, None, 0.0)
    assert report[1] == 2


# -- limits and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"block_size_tokens": 0},
        {"block_size_tokens": -1},
        {"block_size_tokens": (1 << 20) + 1},
        {"block_size_tokens": 1 << 60},
        {"block_size_tokens": 1 << 64},
        {"block_size_tokens": 4.0},
        {"block_size_tokens": "4"},
        {"seed": "\ud800"},
        {"seed": b""},
        {"ttl_s": math.nan},
        {"ttl_s": -1.0},
        {"ttl_s": "1"},
        *({name: value} for name in LIMITS if name != "ttl_s" for value in (-1, 1 << 64, 1.5, None)),
    ],
    ids=str,
)
def test_limits_and_sizes_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(REFUSED):
        make(**arguments)


@pytest.mark.parametrize("value", [0, (1 << 64) - 1])
def test_bounds_may_be_as_small_or_large_as_a_number_can_be(value: int) -> None:
    core = make(ttl_s=math.inf, **{name: value for name in LIMITS if name != "ttl_s"})
    core.apply("pod", 0, [STORED], None, None, 0.0)
    core.promise("pod", 0, [7], 5.0)
    assert core.stats()[0] == (2 if value else 0)


def test_the_largest_block_size_works() -> None:
    core = make(1 << 20)
    assert core.score_tokens(array("I", [1, 2]), 1, [(0, "mm", b"x")], QUESTION, 0.0).blocks == 0
    assert core.score_tokens(array("I", bytes(4 << 20)), 1, [], QUESTION, 0.0).blocks == 1


# -- keys and tokens ----------------------------------------------------------------------------------------------------

NOT_INTEGERS = {
    "none": None,
    "text": "abc",
    "bytes": b"abcdefgh",
    "bytearray": bytearray(8),
    "texts": ["1"],
    "floats": [1.0],
    "float array": array("f", [1.0]),
    "double array": array("d", [1.0]),
    "negative": [-1],
    "negative array": array("i", [-1]),
    "too large": [1 << 64],
    "iterator": iter([1]),
    "set": {1},
    "number": 1,
    "two dimensions": memoryview(bytes(32)).cast("Q", (2, 2)),
    "two dimensions of 32 bits": memoryview(bytes(32)).cast("I", (4, 2)),
    "no dimension": memoryview(bytes(8)).cast("Q", ()),
    "no dimension of 32 bits": memoryview(bytes(4)).cast("I", ()),
}
integers = pytest.mark.parametrize("value", NOT_INTEGERS.values(), ids=NOT_INTEGERS)


@integers
def test_keys_that_are_none_are_refused(core: Any, value: Any) -> None:
    asked: list[Callable[[], Any]] = [
        lambda: core.lookup(value, None, 0.0),
        lambda: core.score_keys(value, 4, QUESTION, 0.0),
        lambda: core.promise("pod", 0, value, 1.0),
    ]
    for ask in asked:
        with pytest.raises(REFUSED):
            ask()


@integers
def test_tokens_that_are_none_are_refused(core: Any, value: Any) -> None:
    stored = ([3], None, value, 4, "gpu", 0, None, None, None)
    asked: list[Callable[[], Any]] = [
        lambda: core.score_tokens(value, 1, [], QUESTION, 0.0),
        lambda: core.score_prompts([(array("I", [1]), 1, []), (value, 1, [])], QUESTION, 0.0),
        lambda: core.apply("pod", 0, [STORED, stored], None, None, 0.0),
    ]
    for ask in asked:
        with pytest.raises(REFUSED):
            ask()


def test_tokens_beyond_32_bits_are_refused(core: Any) -> None:
    with pytest.raises(OverflowError):
        core.score_tokens([1 << 32], 1, [], QUESTION, 0.0)


@pytest.mark.parametrize("step", [1, 2, -1])
def test_buffers_may_have_strides(core: Any, step: int) -> None:
    tokens = [*range(9), 7][::step]
    view = memoryview(array("I", [*range(9), 7]))[::step]
    scores = [core.score_tokens(given, ROOT, [], QUESTION, 0.0) for given in (tokens, view, array("I", tokens))]
    assert [found.to_dict() for found in scores] == [scores[0].to_dict()] * 3
    assert [found.blocks for found in scores] == [len(tokens) // 4] * 3


def test_numpy_arrays_are_read_by_value_or_refused(core: Any) -> None:
    numpy = pytest.importorskip("numpy")
    tokens = numpy.arange(18)
    for given in (tokens.astype("u4")[:9], tokens.astype("u4").repeat(2)[:18:2], tokens[:9]):
        assert core.score_tokens(given, ROOT, [], QUESTION, 0.0).to_dict() == {"pod": 2}
    for given in (tokens.astype("u4").reshape(3, 6), tokens.astype("f4"), tokens.reshape(3, 6), tokens - 1):
        with pytest.raises(REFUSED):
            core.score_tokens(given, ROOT, [], QUESTION, 0.0)


# -- time ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now_s", [math.nan, math.inf, -math.inf, None, "0"])
def test_a_time_that_is_none_is_refused(core: Any, now_s: Any) -> None:
    asked: list[Callable[[], Any]] = [
        lambda: core.apply("pod", 0, [STORED], None, None, now_s),
        lambda: core.apply_payloads("pod", 0, [], "vllm", None, now_s),
        lambda: core.lookup([1], None, now_s),
        lambda: core.score_keys([1], 4, QUESTION, now_s),
        lambda: core.score_tokens([1], 1, [], QUESTION, now_s),
        lambda: core.score_prompts([], QUESTION, now_s),
        lambda: core.expire(now_s),
    ]
    for ask in asked:
        with pytest.raises(REFUSED):
            ask()


def test_a_promise_has_to_end_some_time_or_never(core: Any) -> None:
    with pytest.raises(ValueError, match="end_s"):
        core.promise("pod", 0, [7], math.nan)
    other = make()
    other.promise("pod", 0, [7], math.inf)
    other.expire(1e300)
    assert other.lookup([7], None, 1e300)[2] == [(0, ("pod", 0))]


def test_time_may_be_negative_and_go_backwards(core: Any) -> None:
    assert core.lookup([1], None, -5.0)[0] == []
    assert core.expire(-1e300) == 0


# -- names, events, payloads, questions ---------------------------------------------------------------------------------

MISTAKES: dict[str, Callable[[Any], Any]] = {
    "a pod with a lone surrogate": lambda core: core.mark("\ud800", 0, None),
    "a pod that is bytes": lambda core: core.mark(b"pod", 0, None),
    "a negative rank": lambda core: core.mark("pod", -1, None),
    "a rank beyond 32 bits": lambda core: core.drop("pod", 1 << 32, False),
    "a reason beyond 8 bits": lambda core: core.mark("pod", 0, 256),
    "a model with a lone surrogate": lambda core: core.apply("pod", 0, [STORED], "\ud800", None, 0.0),
    "pods with a lone surrogate": lambda core: core.lookup([1], ["\ud800"], 0.0),
    "pods that are one text": lambda core: core.lookup([1], "pod", 0.0),
    "an event of no known form": lambda core: core.apply("pod", 0, [STORED, (1, 2)], None, None, 0.0),
    "an event that is none": lambda core: core.apply("pod", 0, [STORED, None], None, None, 0.0),
    "a negative hash": lambda core: core.apply("pod", 0, [STORED, ([-1], "gpu", 0)], None, None, 0.0),
    "a hash beyond 64 bits": lambda core: core.apply("pod", 0, [STORED, ([1 << 64], "gpu", 0)], None, None, 0.0),
    "a tier with a lone surrogate": lambda core: core.apply("pod", 0, [STORED, ("\ud800",)], None, None, 0.0),
    "a group of unknown kind": lambda core: core.apply(
        "pod", 0, [STORED, ([3], None, [1], 1, "gpu", 0, ("x", None, None), None, None)], None, None, 0.0
    ),
    "a block size beyond 32 bits": lambda core: core.apply(
        "pod", 0, [STORED, ([3], None, [1], 1 << 32, "gpu", 0, None, None, None)], None, None, 0.0
    ),
    "fewer extras than hashes": lambda core: core.apply(
        "pod", 0, [STORED, ([3], None, [1], 1, "gpu", 0, None, None, [])], None, None, 0.0
    ),
    "payloads that are one": lambda core: core.apply_payloads("pod", 0, b"payload", "vllm", None, 0.0),
    "a payload that is text": lambda core: core.apply_payloads("pod", 0, ["payload"], "vllm", None, 0.0),
    "a wire that is not known": lambda core: core.apply_payloads("pod", 0, [b""], "generic", None, 0.0),
    "a scorer that is not built in": lambda core: core.score_keys([1], 4, (None, None, "x", [], 0.1, 1.0), 0.0),
    "a weight that is no number": lambda core: core.score_keys([1], 4, (None, None, "coverage", [("gpu", "1")], 0.1, 1.0), 0.0),
    "a question without a scorer": lambda core: core.score_keys([1], 4, (None, None), 0.0),
    "a negative length": lambda core: core.score_keys([1], -1, QUESTION, 0.0),
    "a length beyond 64 bits": lambda core: core.score_keys([1], 1 << 64, QUESTION, 0.0),
    "a negative root": lambda core: core.score_tokens([1], -1, [], QUESTION, 0.0),
    "an extra beyond 64 bits": lambda core: core.score_tokens([1], 1, [(1 << 63, "mm", b"")], QUESTION, 0.0),
    "an extra without a value": lambda core: core.score_tokens([1], 1, [(0, "mm")], QUESTION, 0.0),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused_before_anything_changes(core: Any, mistake: Callable[[Any], Any]) -> None:
    with pytest.raises(REFUSED):
        mistake(core)


def test_odd_numbers_in_a_question_are_answered(core: Any) -> None:
    keys = [1, (1 << 64) - 1] * 50
    for scorer in ("longest-prefix", "highest-block-hit", "coverage"):
        for odd in (math.nan, math.inf, -1.0):
            core.score_keys(keys, (1 << 64) - 1, (None, None, scorer, [("gpu", odd), ("gpu", odd)], odd, odd), 0.0).rows()
    for offset in (-(1 << 63), (1 << 63) - 1):
        assert core.score_tokens(range(8), 1, [(offset, "", b"")], QUESTION, 0.0).blocks == 2


def test_sizes_of_groups_may_be_anything(core: Any) -> None:
    other = make(1)
    for window in (None, 0, 1, (1 << 64) - 1):
        for size in (None, 0, 1, (1 << 32) - 1):
            for kind in ("full", "sliding_window", "state", "ignored"):
                stored = ([1, 2], None, [1, 2], 1, "gpu", 0, (kind, window, size), None, None)
                for index in (core, other):
                    index.apply("other", 0, [stored], None, None, 0.0)
                    index.score_tokens([1, 2, 3], ROOT, [], QUESTION, 0.0).rows()
                    index.drop("other", 0, True)


# -- keys of other kinds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["", "own", "engine", "engine ", "Kvatlas", None, 1])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(REFUSED):
        make(mode=mode)


@pytest.mark.parametrize(
    "arguments",
    [
        ("sha256", b"root", [1], 1, []),
        ("sha256_cbor", "root", [1], 1, []),
        ("sha256_cbor", b"root", [1], 0, []),
        ("sha256_cbor", b"root", [1], 1 << 60, []),
        ("sha256_cbor", b"root", [1 << 32], 1, []),
        ("sha256_cbor", b"root", [-1], 1, []),
        ("sha256_cbor", b"root", [1, 2], 1, [(1, b"\xf6"), (0, b"\xf6")]),
        ("sha256_cbor", b"root", [1, 2], 1, [(0, b"\xf6"), (0, b"\xf6")]),
        ("sha256_cbor", b"root", [1, 2], 1, [(-1, b"\xf6")]),
        ("sha256_cbor_64bit", b"root", [1], 1, []),
        ("llmd-cbor-fnv", b"", [1], 1, []),
        ("llmd-xxh64", bytes(9), [1], 1, []),
    ],
)
def test_block_keys_refuses_what_makes_no_sense(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(REFUSED):
        _native.block_keys(*arguments)


def test_a_core_of_engine_hashes_holds_what_it_is_told() -> None:
    core = make(mode="engine sha256")
    core.apply("pod", 0, [([7], None, [], None, "gpu", 0, None, None, None)], "m", None, 0.0)
    asked = (None, "other", "longest-prefix", [("gpu", 1.0)], 0.1, 1.0)
    assert core.score_keys([7], 5, asked, 0.0).to_dict() == {"pod": 1}
    assert len(core.score_keys([7], 5, asked, 0.0, True)) == 0
