"""How an engine hashes its blocks, and whether the settings of keys go with that."""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec

from kvatlas.doctor.check import CheckList
from kvatlas.keys.engine_hashes import (
    COMMON_SEEDS,
    UNSET_SEED,
    WIRE_BYTES,
    HashedBlock,
    HashMatch,
    HashScheme,
    identify,
    known_schemes,
)

CHECK = "engine hashes"


class ExpectedKeys(msgspec.Struct, frozen=True):
    """The settings of keys: ``scheme`` is what they say of engines, None where keys are no engine hashes."""

    mode: str = "kvatlas"
    scheme: HashScheme | None = None


def settings_lines(scheme: HashScheme, block_size_tokens: int | None) -> str:
    """Return the settings that make an engine's hashes the index's keys, as ``--set`` and a file's keys name them."""
    lines = ["keys.mode: engine", f"keys.engine.algorithm: {scheme.algorithm}"]
    lines.append("no keys.engine.seed" if scheme.seed == UNSET_SEED else f"keys.engine.seed: {json.dumps(scheme.seed)}")
    if block_size_tokens is not None:
        lines.append(f"keys.blockSize: {block_size_tokens}")
    return ", ".join(lines)


def check_hashes(
    found: CheckList,
    blocks: Sequence[HashedBlock],
    expected: ExpectedKeys,
    seeds: Sequence[str],
    block_size_tokens: int | None,
) -> None:
    """Find algorithm and seed, and compare them. ``block_size_tokens``: the engine's, if it has one size of blocks."""
    tried = [*seeds, *((expected.scheme.seed,) if expected.scheme and expected.scheme.seed != UNSET_SEED else ())]
    match = identify(blocks, known_schemes(tried))
    if match is None and not any(block.parent is None or len(block.parent) > WIRE_BYTES for block in blocks):
        remedy = "name a replay endpoint, or send a prompt that the engine has not seen"
        found.skip(CHECK, "no chain from its first block on to compute them from", remedy)
    elif expected.scheme is None:
        _bridged(found, match, tried, block_size_tokens)
    else:
        _as_keys(found, match, expected.scheme, tried, block_size_tokens)


def _bridged(found: CheckList, match: HashMatch | None, tried: Sequence[str], block_size_tokens: int | None) -> None:
    bridged = "kvatlas does not need it: it learns from each event what a hash stands for"
    if match is None:
        remedy = f"give the engine's PYTHONHASHSEED with --seed; without one xxhash is random. {bridged}"
        found.warn(CHECK, f"no known algorithm with PYTHONHASHSEED unset, {_seeds(tried)}", remedy)
    elif match.matched < match.checked:
        seen = f"{match.scheme} explains {match.matched} of {match.checked} blocks"
        found.warn(CHECK, seen, f"does the engine restart with another seed? {bridged}")
    else:
        possible = "nothing to do; they could be the index's keys, so that events need no tokens"
        lines = settings_lines(match.scheme, block_size_tokens)
        found.ok(CHECK, f"{match.scheme}: all {match.checked} blocks checked", f"{possible}: {lines}")


def _as_keys(
    found: CheckList, match: HashMatch | None, ours: HashScheme, tried: Sequence[str], block_size_tokens: int | None
) -> None:
    """Where keys are the engines' hashes, a wrong algorithm or seed means that nothing is ever found."""
    if match is None:
        seen = (
            f"not {ours} (the settings), nor another algorithm with PYTHONHASHSEED unset, {_seeds(tried)}: no prompt is found"
        )
        remedy = "give the engine's PYTHONHASHSEED with --seed to have it recognized, or set keys.mode: kvatlas"
        found.fail(CHECK, seen, remedy)
    elif match.scheme != ours:
        seen = f"{match.scheme}, but the settings say {ours}: no prompt is found"
        found.fail(CHECK, seen, f"set {settings_lines(match.scheme, block_size_tokens)}")
    elif match.matched < match.checked:
        seen = f"{match.scheme} explains {match.matched} of {match.checked} blocks; the others no prompt finds"
        remedy = "does the engine restart with another seed? Start it with one PYTHONHASHSEED, or set keys.mode: kvatlas"
        found.warn(CHECK, seen, remedy)
    else:
        found.ok(CHECK, f"{match.scheme}, as the settings say: all {match.checked} blocks checked")


def _seeds(tried: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys((*COMMON_SEEDS, *tried)))
