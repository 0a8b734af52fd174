"""Engine hashes computed from tokens equal those that vLLM's own functions made."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from kvatlas.keys.engine_hashes import UNSET_SEED, HashedBlock, HashScheme, identify, known_schemes, match_scheme

DATA = Path(__file__).parents[2] / "data" / "vllm-0.32"
VECTORS: list[dict[str, Any]] = json.loads((DATA / "hash_vectors.json").read_text())


def scheme_of(vector: dict[str, Any]) -> HashScheme:
    return HashScheme(vector["algo"], vector["seed"] or UNSET_SEED)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['algo']}-{v['seed']}-{v['extra']}")
def test_vllms_own_hashes_are_computed_from_tokens(vector: dict[str, Any]) -> None:
    scheme = scheme_of(vector)
    extra_keys = ast.literal_eval(vector["extra_keys"]) or ()
    assert scheme.none_hash().hex() == vector["none_hash"]
    first = scheme.block_hash(scheme.none_hash(), vector["block1"], extra_keys)
    assert first.hex() == vector["h1"]
    assert int.from_bytes(first[-8:], "big") == vector["ext1"]
    second = scheme.block_hash(first, vector["block2"])
    assert second.hex() == vector["h2"]


def chain(scheme: HashScheme, blocks: int, wire_bytes: int | None = None) -> list[HashedBlock]:
    """A chain of blocks as an engine would announce them; ``wire_bytes`` None: whole digests."""
    cut = slice(None) if wire_bytes is None else slice(-wire_bytes, None)
    parent = scheme.none_hash()
    announced: list[HashedBlock] = []
    for i in range(blocks):
        tokens = tuple(range(i * 4, i * 4 + 4))
        digest = scheme.block_hash(parent, tokens)
        announced.append(HashedBlock(digest[cut], parent[cut] if i else None, tokens))
        parent = digest
    return announced


@pytest.mark.parametrize("scheme", known_schemes(["my-seed"]), ids=str)
@pytest.mark.parametrize("wire_bytes", [8, None], ids=["integers", "digests"])
def test_every_known_scheme_is_told_from_the_others(scheme: HashScheme, wire_bytes: int | None) -> None:
    found = identify(chain(scheme, 3, wire_bytes), known_schemes(["my-seed"]))
    assert found is not None
    assert (found.scheme, found.checked, found.matched) == (scheme, 3, 3)


def test_an_unknown_seed_is_not_identified() -> None:
    assert identify(chain(HashScheme("sha256_cbor", "secret"), 3, 8), known_schemes()) is None


def test_blocks_after_an_unseen_parent_are_left_out_where_hashes_are_integers() -> None:
    scheme = HashScheme("sha256_cbor", "0")
    assert match_scheme(scheme, chain(scheme, 4, 8)[1:]).checked == 0


def test_blocks_after_an_unseen_parent_are_checked_where_hashes_are_whole_digests() -> None:
    scheme = HashScheme("sha256_cbor", "0")
    match = match_scheme(scheme, chain(scheme, 4)[1:])
    assert (match.checked, match.matched) == (3, 3)


def test_digests_that_differ_before_their_last_8_bytes_do_not_match() -> None:
    scheme = HashScheme("sha256_cbor", "0")
    (block,) = chain(scheme, 1)
    damaged = HashedBlock(bytes([block.hash[0] ^ 1]) + block.hash[1:], None, block.token_ids)
    assert match_scheme(scheme, [damaged]).matched == 0
