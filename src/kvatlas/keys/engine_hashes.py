"""vLLM's own block hashes, computed from tokens: to tell which algorithm and seed an engine runs with.

    none_hash = H(seed)
    h_i       = H((h_{i-1} or none_hash, token ids of block i, extra keys of block i or None))

H serializes (canonical CBOR, or pickle) and digests (SHA-256, or XXH3-128). The whole digest is chained; events carry its last
8 bytes, big endian, or (by engine setting) all of it. Extra keys are tagged: ``("mm", id, offset)``, ``("cache_salt", salt)``,
``("prompt_embeds", digest)``, and ``("lora", name, path)``, whose path no event tells. Read in vLLM 0.32
``v1/core/kv_cache_utils.py`` and checked with hashes made by its functions. Pickled hashes hold for this Python's pickle
format only. Nothing in the index depends on any of this: it reads engine hashes as opaque names.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import xxhash

ExtraKey = tuple[str | bytes | int, ...]
"""One tagged part of what a block's hash depends on beside its tokens."""

WIRE_BYTES = 8
"""How much of a digest events carry where hashes are sent as integers."""

UNSET_SEED = "vllm-none-hash"
"""What sha256 engines hash where PYTHONHASHSEED is not set. xxhash engines take random bytes then."""

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
        tagged = tuple((sys.intern(tag) if isinstance(tag, str) else tag, *rest) for tag, *rest in extra_keys)
        return _HASHES[self.algorithm]((parent, tuple(token_ids), tagged or None))

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
        for seed in ([UNSET_SEED, *named] if algorithm.startswith("sha256") else named)
    ]


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


def _cbor(value: object) -> bytes:
    """Return canonical CBOR (RFC 8949, section 4.2) of the few types that are hashed."""
    if value is None:
        return b"\xf6"
    if isinstance(value, int) and not isinstance(value, bool):
        return _cbor_head(0, value) if value >= 0 else _cbor_head(1, -1 - value)
    if isinstance(value, bytes):
        return _cbor_head(2, len(value)) + value
    if isinstance(value, str):
        text = value.encode()
        return _cbor_head(3, len(text)) + text
    if isinstance(value, tuple):
        return _cbor_head(4, len(value)) + b"".join(map(_cbor, value))
    raise TypeError(f"{type(value).__name__} has no place in a block hash")


def _cbor_head(major: int, number: int) -> bytes:
    """Return a type and a number (the value itself, or a length) in as few bytes as hold it."""
    if number < 24:
        return bytes([major << 5 | number])
    for info, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * size:
            return bytes([major << 5 | info]) + number.to_bytes(size, "big")
    raise ValueError(f"{number} needs more than 64 bits")


_HASHES: Mapping[str, Callable[[object], bytes]] = {
    "sha256": _sha256(_pickled),
    "sha256_cbor": _sha256(_cbor),
    "xxhash": _xxh3(_pickled),
    "xxhash_cbor": _xxh3(_cbor),
}
