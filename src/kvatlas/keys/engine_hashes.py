"""vLLM's own block hashes, computed from tokens: to have them as keys, and to tell an engine's algorithm and seed.

    none_hash = H(seed)
    h_i       = H((h_{i-1} or none_hash, token ids of block i, extra keys of block i or None))

H serializes (canonical CBOR, or pickle) and digests (SHA-256, or XXH3-128). The whole digest is chained; events carry its last
8 bytes, big endian, or (by engine setting) all of it. Extra keys are tagged: ``("mm", id, offset)``, ``("cache_salt", salt)``,
``("prompt_embeds", digest)``, and ``("lora", name, path)``, whose path no event tells. Read in vLLM 0.32
``v1/core/kv_cache_utils.py`` and checked with hashes made by its functions. Pickled hashes hold for this Python's pickle
format only. Unless its keys are engine hashes (``keys.mode``), the index depends on nothing of this: they are opaque names.

``sha256_cbor_64bit`` is that of vLLM 0.10 (pull request 20511): the last 64 bits of the digest are chained, as a number, and
extra keys have no tags: an adapter's number, the content hashes of items, the salt.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import xxhash

from kvatlas.keys.cbor import cbor

ExtraKey = tuple[str | bytes | int, ...]
"""One tagged part of what a block's hash depends on beside its tokens."""

WIRE_BYTES = 8
"""How much of a digest events carry where hashes are sent as integers."""

SHA256_CBOR_64BIT = "sha256_cbor_64bit"

UNSET_SEED = "vllm-none-hash"
"""What sha256 engines hash where PYTHONHASHSEED is not set. The others take random bytes then; before August 2026 all did."""

COMMON_SEEDS = ("0", "42")


class HashScheme(msgspec.Struct, frozen=True):
    """An algorithm, by the name that ``--prefix-caching-hash-algo`` has for it, and a seed (PYTHONHASHSEED)."""

    algorithm: str
    seed: str

    def none_hash(self) -> bytes:
        """Return the parent of every first block."""
        return _HASHES[self.algorithm](self.seed)

    def block_hash(self, parent: bytes, token_ids: Iterable[int], extra_keys: Sequence[ExtraKey] = ()) -> bytes:
        """Return a block's digest. ``parent``: the whole digest of the block before it, or :meth:`none_hash`."""
        chained = int.from_bytes(parent[-WIRE_BYTES:], "big") if self.algorithm == SHA256_CBOR_64BIT else parent
        return _HASHES[self.algorithm]((chained, tuple(token_ids), self._hashed(extra_keys)))

    def serialized(self, extra_keys: Sequence[ExtraKey]) -> bytes:
        """Return what stands for extra keys in the CBOR of a block."""
        return cbor(self._hashed(extra_keys))

    def _hashed(self, extra_keys: Sequence[ExtraKey]) -> tuple[object, ...] | None:
        if self.algorithm == SHA256_CBOR_64BIT:
            return tuple(int(key[2]) if key[0] == "lora" else key[1] for key in extra_keys) or None
        return tuple((sys.intern(tag) if isinstance(tag, str) else tag, *rest) for tag, *rest in extra_keys) or None

    def __str__(self) -> str:
        seed = "PYTHONHASHSEED unset" if self.seed == UNSET_SEED else f"PYTHONHASHSEED={self.seed}"
        return f"{self.algorithm}, {seed}"


class HashedBlock(msgspec.Struct, frozen=True):
    """A block as an event announced it. Hashes are 8 bytes (an integer, big endian) or a whole digest."""

    hash: bytes
    parent: bytes | None
    token_ids: tuple[int, ...]
    extra_keys: tuple[ExtraKey, ...] = ()


class HashMatch(msgspec.Struct, frozen=True):
    """How well a scheme explains what was seen: ``matched`` of the ``checked`` blocks whose parent's digest is known."""

    scheme: HashScheme
    checked: int
    matched: int


def known_schemes(seeds: Sequence[str] = ()) -> list[HashScheme]:
    """Return every algorithm with the seeds that engines are likely to have, and the given ones."""
    named = list(dict.fromkeys((*seeds, *COMMON_SEEDS)))
    return [
        HashScheme(algorithm, seed)
        for algorithm in _HASHES
        for seed in (named if random_without_seed(algorithm) else [UNSET_SEED, *named])
    ]


def random_without_seed(algorithm: str) -> bool:
    """Tell whether engines take a random seed where PYTHONHASHSEED is not set."""
    return algorithm.startswith("xxhash") or algorithm == SHA256_CBOR_64BIT


def identify(blocks: Sequence[HashedBlock], schemes: Sequence[HashScheme]) -> HashMatch | None:
    """Return the scheme that explains most of ``blocks`` (in order of their events); None if none explains any.

    A chain can be checked from its first block on, or from anywhere where hashes are whole digests.
    """
    matches = [match_scheme(scheme, blocks) for scheme in schemes]
    best = max(matches, key=lambda match: match.matched, default=None)
    return best if best is not None and best.matched else None


def match_scheme(scheme: HashScheme, blocks: Sequence[HashedBlock]) -> HashMatch:
    """Compute every block's hash that can be computed, and compare it with the announced one."""
    none_hash = scheme.none_hash()
    digests: dict[bytes, bytes] = {}
    checked = matched = 0
    for block in blocks:
        parent = none_hash if block.parent is None else digests.get(block.parent)
        if parent is None and block.parent is not None and len(block.parent) > WIRE_BYTES:
            parent = block.parent
        if parent is None:
            continue
        checked += 1
        digest = scheme.block_hash(parent, block.token_ids, block.extra_keys)
        if digest in (block.hash, digest[:-WIRE_BYTES] + block.hash):
            matched += 1
            digests[block.hash] = digest
    return HashMatch(scheme, checked, matched)


def _sha256(serialize: Callable[[object], bytes]) -> Callable[[object], bytes]:
    return lambda value: hashlib.sha256(serialize(value)).digest()


def _xxh3(serialize: Callable[[object], bytes]) -> Callable[[object], bytes]:
    return lambda value: xxhash.xxh3_128_digest(serialize(value))


def _pickled(value: object) -> bytes:
    """Return the pickle of a value; an object that occurs twice in it (a tag, interned) is written once."""
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


_HASHES: Mapping[str, Callable[[object], bytes]] = {
    "sha256": _sha256(_pickled),
    "sha256_cbor": _sha256(cbor),
    "xxhash": _xxh3(_pickled),
    "xxhash_cbor": _xxh3(cbor),
    SHA256_CBOR_64BIT: lambda value: hashlib.sha256(cbor(value)).digest()[-WIRE_BYTES:],
}

ALGORITHMS = tuple(_HASHES)
"""By the names that ``--prefix-caching-hash-algo`` has for them."""
